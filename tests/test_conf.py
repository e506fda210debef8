"""Every configuration composes, resolves and builds, and every file of conf/ is composed."""

import unclip  # isort: skip # noqa: F401

import re
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from unclip import bundle
from unclip.diffusion import LogitNormal
from unclip.evaluation.measurement import Measurement

CONF = Path(__file__).parents[1] / "conf"
STAGES = ("clip", "judge", "prior", "prior_ar", "decoder", "upsampler_256", "upsampler_1024")
SCALES = ("emoji", "emoji_m", "quick", "karlo", "paper")

# The groups from which each program chooses one.
COMMON = ("data", "logger", "trainer", "sweep")
GROUPS = {
    "train": (*COMMON, "embedder", "sampler", "optimizer", "schedule"),
    "evaluate": (*COMMON, "protocol", "measure"),
}
SWEPT_BY = {"guidance": "evaluate"}  # train.py has the other sweeps

# Presets of other scales, at scales without a preset of the stage.
BORROWED = {("judge", "paper"): "judge/karlo", ("upsampler_1024", "karlo"): "upsampler_1024/paper"}

# Table 3 of the paper, and the parameters of Karlo's networks, in millions.
SIZES = {
    ("prior", "karlo"): 1022,
    ("decoder", "karlo"): 893,
    ("upsampler_256", "karlo"): 691.6,
    ("prior", "paper"): 1335,
    ("prior_ar", "paper"): 2115,
    ("decoder", "paper"): 3554,
    ("upsampler_256", "paper"): 729.7,
    ("upsampler_1024", "paper"): 282.1,
}


def composed(*overrides, program="train"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(program, ["run_folder=runs/test", "data.root=data/test", *overrides])
    complete = program != "evaluate"  # it needs no trainer.max_steps
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=complete)


def options(group, program):
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if group == "sweep":
        names = [name for name in names if SWEPT_BY.get(name, "train") == program]
    return names


def find_targets(config):
    """Find each class and function that a configuration names, or raise."""
    for target in re.findall(r"_target_: ([\w.]+)", yaml.safe_dump(config)):
        get_object(target)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_builds_at_every_scale(stage, scale):
    preset = BORROWED.get((stage, scale))
    borrowed = [] if preset is None else [f"preset={preset}"]
    config = composed(f"stage={stage}", f"scale={scale}", *borrowed)
    with torch.device("meta"):
        built = bundle.build(config["model"])
    assert built.name == ("clip" if stage == "judge" else stage)
    assert built.needs_clip == config["needs_clip"]
    if (stage, scale) in SIZES:
        millions = sum(p.numel() for p in built.parameters()) / 1e6
        assert millions == pytest.approx(SIZES[stage, scale], rel=0.02)
    find_targets(config)


@pytest.mark.parametrize("program", GROUPS)
def test_every_choice_composes(program):
    """Compose as often as the largest group has choices, each time with another of every group.

    Measurements, which cost nothing to build, are built.
    """
    choices = {group: options(group, program) for group in GROUPS[program]}
    for turn in range(max(len(names) for names in choices.values())):
        chosen = [f"{group}={names[turn % len(names)]}" for group, names in choices.items()]
        config = composed(*chosen, program=program)
        find_targets(config)
        measurements = instantiate(config.get("measure", {}), _convert_="all")
        assert all(isinstance(one, Measurement) for one in measurements.values())


@pytest.mark.parametrize("program", ["embed", "plan"])
def test_programs_around_training_compose_too(program):
    for stage in STAGES:
        assert composed(f"stage={stage}", program=program)["stage"] == stage


def test_all_files_are_composed_here():
    programs = {path.stem for path in CONF.glob("*.yaml")}
    assert programs == {*GROUPS, "embed", "plan"}
    composed_elsewhere = {"stage", "scale", "preset"}  # with every stage and scale
    folders = {path.name for path in CONF.iterdir() if path.is_dir()}
    assert folders == composed_elsewhere.union(*GROUPS.values())
    assert {path.stem for path in (CONF / "stage").glob("*.yaml")} == set(STAGES)
    assert {path.stem for path in (CONF / "scale").glob("*.yaml")} == set(SCALES)
    swept = [set(options("sweep", program)) for program in ("train", "evaluate")]
    assert set.union(*swept) == {path.stem for path in (CONF / "sweep").glob("*.yaml")}


def test_every_preset_belongs_to_a_stage_and_a_scale():
    presets = {(path.parent.name, path.stem) for path in (CONF / "preset").glob("*/*.yaml")}
    assert presets <= {(stage, scale) for stage in STAGES for scale in SCALES}


def test_the_decoder_s_options_are_settings():
    """Attention at 16×16, the cap of the loss weight, feature maps and timestep density."""
    words = ("stage=decoder", "network.attention_levels=[1,2,3]", "+diffusion.gamma=20")
    off = ("network.feature_maps=null", "diffusion.timestep_density=null")
    with torch.device("meta"):
        given = bundle.build(composed(*words)["model"])
        plain = bundle.build(composed(*words, *off)["model"])
    for stage in (given, plain):
        assert stage.diffusion.gamma == 20
        assert [bool(level.attention) for level in stage.network.down] == [False, True, True, True]
    assert given.network.feature_maps.image_size == given.image_size == 64
    assert given.diffusion.timestep_density == LogitNormal(mean=0.6, std=1.0)
    assert plain.network.feature_maps is plain.diffusion.timestep_density is None
