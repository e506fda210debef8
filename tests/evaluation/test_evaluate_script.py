import runpy
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

from unclip.evaluation.benchmark import Benchmark

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_hydra_left():
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


def composed(*overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("evaluate", list(overrides))


def test_the_offline_metrics_are_the_benchmarks_own_defaults():
    cfg = composed()
    assert instantiate(cfg.metrics, _convert_="all") == Benchmark()
    assert cfg.out == cfg.model and cfg.data.root


def test_the_command_line_reaches_the_benchmark():
    cfg = composed("metrics=quick", "guidance=1.5", "steps.decoder=8", "seed=3", "device=cpu")
    quick = instantiate(cfg.metrics, _convert_="all")
    assert quick.pictures < Benchmark().pictures
    assert quick.guidance_scale == 1.5 and quick.prior_guidance_scale is None
    assert quick.steps == {"decoder": 8} and quick.seed == 3 and quick.device == "cpu"


def test_a_missing_bundle_ends_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "model=models/typo", "metrics=quick"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "src" / "evaluate.py"), run_name="__main__")
    assert "models/typo holds no stage" in str(stopped.value)
    assert list(tmp_path.iterdir()) == []
