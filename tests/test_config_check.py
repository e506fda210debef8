"""A wrong command line is refused at once, with the nearest valid name."""

import unclip  # isort: skip # noqa: F401

import math
import os
import sys
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from cli import config_check, training
from cli.config_check import ConfigurationError, check_targets, compose_strictly
from cli.ranges import check_ranges
from cli.training import check

BASE = ("scale=quick", "data=folder", "data.root=nowhere", "run_folder=x")


def composed(*words):
    cfg = compose_strictly("train", [*BASE, *words])
    cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stage=prior", "network.widht=3"], r"no key network\.widht; did .* network\.width\?"),
        (["trainer.max_step=3"], r"did you mean trainer\.max_steps\?"),
        (["lr=3"], r"there is no key lr; did you mean optimizer\.lr\?"),
        (["optimiser=adamw"], r"did you mean optimizer\?"),
        (["stage=decodr"], r"no stage=decodr; did you mean decoder\? \(choices: clip, d"),
        (["stage=prior", "preset=prior/emojy"], "no preset=prior/emojy.* with preset=prior/SIZE"),
        (["callbacks.ema.decya=0.5"], r"did you mean callbacks\.ema\.decay\?"),
        (["hydra.launcher.n_job=2"], r"did you mean hydra\.launcher\.n_jobs\?"),
        (["trainer.max_steps=many"], r"trainer\.max_steps=many: expected a number such as 30"),
        (["stage=prior", "data.load_image=maybe"], "load_image=maybe: expected true or false"),
        (["optimizer.lr=fast,faster"], "optimizer.lr=fast: expected a number"),
        (["trainer.max_steps=[3"], "no viable alternative"),
        (["data.root=${oc.env:MY_API_KEY}"], "must not contain secrets"),
        (["data.root=${oc.env:'MY_API_KEY'}"], r"\${oc.env:'MY_API_KEY'}: the config"),
        (["trainer.devices=many"], r"trainer\.devices=many: expected a number such as 1"),
        (["stage=prior", "+network.widht=3"], "PriorTransformer has no argument widht; .* width"),
        (["+data.corp=3,4"], "ShardDataModule has no argument corp; did you mean crop"),
        (["stage=judge", "scale=paper"], "no preset=judge/paper.* with preset=judge/SIZE"),
        (["+lr=3"], r"there is no key lr; did you mean optimizer\.lr\?"),
    ],
)
def test_a_wrong_word_is_refused_with_the_nearest_valid_one(words, said):
    with pytest.raises(ConfigurationError, match=said):
        compose_strictly("train", [*BASE, *words])


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer.lr=1e-4,3e-4"],
        ["optimizer.lr=tag(log,interval(1e-4,1e-2))", "hydra/sweeper=optuna"],
        ["sweep=search"],
        ["+trainer.enable_model_summary=true"],
        ["trainer.devices=auto"],
        ["stage=judge", "scale=paper", "preset=judge/karlo"],
        ["~callbacks.ema"],
        ["+root=here", "data.root=${root}"],
        ["stage=prior", "network._target_=unclip.networks.ARTransformer", "+network.buckets=3"],
        ["+callbacks.mine._target_=unclip.training.callbacks.progress.Throughput"],
        ["trainer.precision=bf16-mixed", "bundle=other", "upstream=train"],
    ],
)
def test_a_valid_command_line_passes(words):
    compose_strictly("train", [*BASE, *words])


@pytest.mark.parametrize(
    ("program", "words"),
    [("train", [*BASE, "trainer.max_steps=0,3"]), ("evaluate", ["protocol.count=0"])],
)
def test_a_number_out_of_range_is_refused(program, words):
    with pytest.raises(ConfigurationError, match=r"^[a-z_.]+=0: it must be at least 1$"):
        compose_strictly(program, words)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("trainer.log_every_n_steps", 0, "at least 1"),
        ("callbacks.samples.count", 0, "at least 1"),
        ("steps.decoder", 0, "at least 1"),
        ("network.multipliers", [1, 0], "at least 1"),
        ("seed", 2**64, "from 0 to 9223372036854775807"),
        ("protocol.seed", -1, "from 0 to 9223372036854775807"),
        ("callbacks.ema.decay", 1.5, "from 0 to 1"),
        ("optimizer.lr", -0.1, "at least 0"),
        ("optimizer.lr", math.nan, "finite"),
        ("trainer.gradient_clip_val", math.inf, "finite"),
        ("optimizer.betas", [0.9, 1.0], "at least 0 and below 1"),
        ("data.workers", -1, "at least 0"),
        ("trainer.limit_val_batches", -1, "at least 0"),
        ("trainer.max_steps_multiplier", 0, "above 0"),
        ("guidance", math.nan, "finite"),
    ],
)
def test_an_error_has_the_key_the_value_and_the_range(key, value, said):
    shown = value[-1] if isinstance(value, list) else value
    with pytest.raises(ValueError) as error:
        check_ranges(value, key)
    assert str(error.value) == f"{key}={shown}: it must be {said}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.workers", 0),
        ("data.shuffle_buffer", 0),
        ("network.dropout", 0),
        ("callbacks.ema.decay", 1),
        ("trainer.limit_val_batches", 0.5),
        ("trainer.gradient_clip_val", None),
        ("measure.guidance.scales", [0.0, -1.5]),
        ("data.root", "0"),
        ("acceleration.compile", False),
    ],
)
def test_the_ends_of_a_range_are_within_it(key, value):
    check_ranges(value, key)


def test_a_sweep_of_evaluations_passes():
    cfg = compose_strictly("evaluate", ["sweep=guidance"])
    assert cfg.hydra.mode.name == "MULTIRUN" and "guidance" in cfg.hydra.sweeper.params


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+trainer.max_stepz=3"], "has no argument max_stepz; did you mean max_steps"),
        (["+network.chanels=3"], "UNet has no argument chanels; did you mean channels"),
        (["data.batch_size=1.5"], r"data\.batch_size=1\.5: expected an integer"),
        (["data.workers=true"], "expected an integer"),
        (["model.guidance_scale=[1]"], "expected a number"),
        (["diffusion.prediction=z0"], "'z0': expected 'x0' or 'eps' or 'v'"),
        (["network._target_=os.system"], r"_target_ os\.system is not in unclip\."),
    ],
)
def test_arguments_are_compared_with_the_signatures_of_their_targets(words, said):
    with pytest.raises(ConfigurationError, match=said):
        check_targets(composed("stage=decoder", *words))


def test_every_stage_passes_unchanged():
    for stage in sorted(path.stem for path in (config_check.CONF / "stage").glob("*.yaml")):
        check_targets(composed(f"stage={stage}"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stage=upsampler_256", "data.crop=512"], "a crop of 512 does not fit into 256"),
        (["stage=upsampler_256", "data.image_size=130"], "image_size=130 is not a multiple of 4"),
        (["stage=decoder", "data.root=pipe:ls"], "unsupported URL scheme 'pipe'"),
        (["stage=decoder", "trainer.max_steps_multiplier=0.001"], "is 0: it must be at least 1"),
        (["stage=decoder"], "nowhere/train/64"),
    ],
)
def test_sizes_that_do_not_fit_and_missing_shards_are_refused(words, said):
    with pytest.raises((ConfigurationError, FileNotFoundError), match=said):
        check(composed(*words))


def test_a_clip_of_another_size_is_refused_with_the_override_that_fits(monkeypatch):
    sizes = {"embedding_dim": 8, "text_width": 16, "context_length": 77}
    clip = SimpleNamespace(**sizes, fingerprint="0123", to=lambda device, dtype: None)
    monkeypatch.setattr(training, "build", lambda config: clip)
    embedder, trainer = {"build": None, "dtype": "auto"}, {"accelerator": "cpu"}
    config = {"needs_clip": True, "embedder": embedder, "trainer": trainer, "clip": sizes}
    assert training.build_embedder(config) is clip
    with pytest.raises(ConfigurationError, match=r"clip\.text_width=16"):
        training.build_embedder(config | {"clip": sizes | {"text_width": 32}})


def test_the_program_exits_with_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["src/train.py"])
    with pytest.raises(SystemExit, match=r"^train\.py: there is no key network\.widht") as ended:
        config_check.check_command_line("train", ["stage=prior", "network.widht=3", "--cfg", "job"])
    assert ended.value.code != 0
    config_check.check_command_line("train", ["--help", "nonsense=1"])


@pytest.mark.parametrize("words", [["decoder"], ["stage", "decoder"], ["--scale", "emoji"]])
def test_a_word_that_is_not_a_setting_is_refused_and_hydras_own_options_pass(words):
    with pytest.raises(SystemExit, match=f"{words[0]}: expected KEY=VALUE, without dashes"):
        config_check.check_command_line("train", words)
    config_check.check_command_line("train", ["-m", "stage=prior", "--cfg", "job", "--resolve"])


def test_a_folder_of_runs_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit, match=r"is not writable: run in another folder, or set folders"):
        config_check.check_command_line("train", ["stage=clip"])
