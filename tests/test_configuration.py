"""What is wrong with a command line is said at once, with the nearest valid name."""

import unclip  # isort: skip # noqa: F401

import sys

import pytest
import torch
from omegaconf import OmegaConf, open_dict

import configuration
import train
from configuration import ConfigurationError, check_targets, compose_strictly
from unclip.training import preflight

BASE = ("scale=quick", "data=folder", "data.root=nowhere", "run_folder=x")


def composed(*words):
    cfg = compose_strictly("train", [*BASE, *words])
    with open_dict(cfg):
        cfg.pop("hydra")
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stage=prior", "network.widht=3"], r"no network\.widht; did you mean network\.width\?"),
        (["trainer.max_step=3"], r"did you mean trainer\.max_steps\?"),
        (["lr=3"], r"there is no lr; did you mean optimizer\.lr\?"),
        (["optimiser=adamw"], r"did you mean optimizer\?"),
        (["stage=decodr"], r"stage=decodr: there is no such stage; did you mean decoder\?"),
        (["preset/prior=emojy"], r"did you mean emoji\?"),
        (["callbacks.ema.decya=0.5"], r"did you mean callbacks\.ema\.decay\?"),
        (["hydra.launcher.n_job=2"], r"did you mean hydra\.launcher\.n_jobs\?"),
        (["trainer.max_steps=many"], r"trainer\.max_steps=many is no number, such as 30"),
        (["stage=prior", "data.load_image=maybe"], "is no true or false"),
        (["optimizer.lr=fast,faster"], "optimizer.lr=fast is no number"),
        (["trainer.max_steps=[3"], "no viable alternative"),
        (["data.root=${oc.env:MY_API_KEY}"], "a secret is not put into the configuration"),
        (["data.root=${oc.env:'MY_API_KEY'}"], r"\${oc.env:'MY_API_KEY'}: a secret is not put"),
        (["trainer.devices=many"], r"trainer\.devices=many is no number, such as 1"),
        (["stage=prior", "+network.widht=3"], "PriorTransformer takes no widht; .* mean width"),
        (["+data.corp=3,4"], "ShardDataModule takes no corp; did you mean crop"),
        (["+lr=3"], r"there is no lr; did you mean optimizer\.lr\?"),
    ],
)
def test_a_wrong_word_is_named_with_the_nearest_right_one(words, said):
    with pytest.raises(ConfigurationError, match=said):
        compose_strictly("train", [*BASE, *words])


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer.lr=1e-4,3e-4"],
        ["optimizer.lr=tag(log,interval(1e-4,1e-2))", "hydra/sweeper=optuna"],
        ["sweep=learning_rate"],
        ["sweep=search"],
        ["+trainer.enable_model_summary=true"],
        ["trainer.devices=auto"],
        ["+text_encoder=transformer"],
        ["+root=here", "data.root=${root}"],
        ["+network.depth=3", "network._target_=elsewhere.Net"],
        ["+callbacks.mine._target_=unclip.training.callbacks.memory.MemoryUse"],
        ["trainer.precision=bf16-mixed", "bundle=other", "upstream=train"],
    ],
)
def test_what_is_right_passes(words):
    compose_strictly("train", [*BASE, *words])


def test_sweeps_of_an_evaluation_pass():
    for sweep in ("guidance", "steps"):
        cfg = compose_strictly("evaluate", [f"sweep={sweep}"])
        assert cfg.hydra.mode.name == "MULTIRUN" and "guidance" in cfg.hydra.sweeper.params


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+trainer.max_stepz=3"], "takes no max_stepz; did you mean max_steps"),
        (["+network.chanels=3"], "UNet takes no chanels; did you mean channels"),
        (["data.batch_size=1.5"], r"data\.batch_size=1\.5 is no whole number"),
        (["data.workers=true"], "is no whole number"),
        (["model.guidance_scale=[1]"], "is no number"),
        (["diffusion.prediction=z0"], "'z0' is no 'x0' or 'eps' or 'v'"),
    ],
)
def test_arguments_are_compared_with_what_takes_them(words, said):
    with pytest.raises(ConfigurationError, match=said):
        check_targets(composed("stage=decoder", *words))


def test_every_stage_passes_as_it_is():
    for stage in sorted(path.stem for path in (configuration.CONF / "stage").glob("*.yaml")):
        check_targets(composed(f"stage={stage}"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stage=upsampler_256", "data.crop=512"], "a crop of 512 does not fit into 256"),
        (["stage=upsampler_256", "data.image_size=130"], "130 pixels are not 4 times"),
        (["stage=decoder", "data.root=pipe:ls"], "unsupported URL scheme 'pipe'"),
    ],
)
def test_what_cannot_work_together_is_refused(words, said):
    with pytest.raises(ConfigurationError, match=said):
        train.check(composed(*words))


def test_missing_shards_are_named():
    with pytest.raises(FileNotFoundError, match="nowhere/train/64"):
        train.check(composed("stage=decoder"))


def test_the_disk_has_to_hold_two_checkpoints(tmp_path, monkeypatch):
    stage = torch.nn.Linear(999, 1000, device="meta")
    assert preflight.checkpoint_bytes(stage) == 16e6
    free = {"bytes": 36_000_000}
    monkeypatch.setattr(
        preflight.shutil, "disk_usage", lambda path: type("U", (), {"free": free["bytes"]})
    )
    preflight.check_disk(stage, [tmp_path / "not" / "there" / "yet"], tmp_path)
    free["bytes"] -= 1
    with pytest.raises(ValueError, match=r"0\.0 GiB are free"):
        preflight.check_disk(stage, [tmp_path], tmp_path)


def test_a_run_that_goes_on_replaces_its_checkpoints(tmp_path, monkeypatch):
    stage = torch.nn.Linear(999, 1000, device="meta")
    for name, size in (("last.ckpt", 16_000_000), ("previous.ckpt", 15_000_000)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    free = {"bytes": 5_000_000}
    monkeypatch.setattr(
        preflight.shutil, "disk_usage", lambda path: type("U", (), {"free": free["bytes"]})
    )
    preflight.check_disk(stage, [tmp_path], tmp_path)
    free["bytes"] -= 1
    with pytest.raises(ValueError, match="are free"):
        preflight.check_disk(stage, [tmp_path], tmp_path)


def test_the_program_ends_with_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["src/train.py"])
    with pytest.raises(SystemExit, match=r"^train\.py: there is no network\.widht") as ended:
        configuration.check_command_line(
            "train", ["stage=prior", "network.widht=3", "--cfg", "job"]
        )
    assert ended.value.code != 0
    configuration.check_command_line("train", ["--help", "nonsense=1"])
