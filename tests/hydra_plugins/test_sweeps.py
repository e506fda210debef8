"""Sweeps of a script whose objective is a simple function of its settings."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SOURCE = Path(__file__).parents[2] / "src"

SCRIPT = """
import json, os, sys, time, hydra
from pathlib import Path
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base="1.3", config_path="conf", config_name="run")
def main(cfg):
    folder = Path(HydraConfig.get().runtime.output_dir)
    about = {"argv": sys.argv[1:], "pid": os.getpid(), "rank": os.environ.get("WORLD_SIZE"),
             "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
             "mode": str(HydraConfig.get().mode)}
    (folder / "about.json").write_text(json.dumps(about))
    time.sleep(cfg.sleep)
    if cfg.fails == cfg.x:
        raise SystemExit(7)
    value = (cfg.x - 3) ** 2 + cfg.y
    (folder / "objective.json").write_text(json.dumps({"name": "error", "value": value}))

main()
"""

CONFIG = """
defaults:
  - _self_
  - sweep: null
  - override hydra/launcher: process
x: 0
y: 0
fails: null
sleep: 0
word: plain
objective: error
direction: minimize
hydra:
  run: {dir: single}
  sweep: {dir: swept}
  launcher:
    overrides: ['word="in {folder}"']
"""

TWO = """# @package _global_
hydra: {mode: MULTIRUN, sweeper: {params: {x: '1,2'}}}
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "conf" / "sweep").mkdir(parents=True)
    (tmp_path / "run.py").write_text(SCRIPT)
    (tmp_path / "conf" / "run.yaml").write_text(CONFIG)
    (tmp_path / "conf" / "sweep" / "two.yaml").write_text(TWO)
    return tmp_path


def start(place, *words, **environment):
    path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "run.py", *words]
    return subprocess.Popen(command, cwd=place, env=environment, **pipes)


def run(place, *words, **environment):
    process = start(place, *words, **environment)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def about(place, job):
    return json.loads((place / "swept" / str(job) / "about.json").read_text())


def table(place):
    with open(place / "swept" / "summary.csv") as file:
        return list(csv.DictReader(file))


def test_each_job_is_a_new_process_and_the_best_comes_first(place):
    code, out, err = run(place, "-m", "x=1,4", "y=0,10", WORLD_SIZE="2", RANK="1")
    assert code == 0, err
    jobs = [about(place, number) for number in range(4)]
    assert len({job["pid"] for job in jobs}) == 4
    assert all(job["rank"] is None and job["mode"] == "RunMode.RUN" for job in jobs)
    assert jobs[1]["argv"][:2] == ["x=1", "y=10"]
    assert f'word="in {place / "swept" / "1"}"' in jobs[1]["argv"]
    rows = table(place)
    assert [(row["x"], row["y"], row["error"]) for row in rows] == [
        ("4", "0", "1"),
        ("1", "0", "4"),
        ("4", "10", "11"),
        ("1", "10", "14"),
    ]
    assert list(rows[0]) == ["job", "x", "y", "error", "minutes", "state"]
    assert out.splitlines()[-6].split()[:4] == ["job", "x", "y", "error"]


def test_a_failed_job_does_not_stop_the_others(place):
    code, _, err = run(place, "-m", "x=1,2,3", "fails=2")
    assert code == 1
    assert "job 1 of the sweep failed with exit code 7: x=2 fails=2" in err
    assert [row["state"] for row in table(place)] == ["done", "done", "failed (7)"]


def test_jobs_in_parallel_share_the_gpus(place):
    words = ("-m", "x=1,2", "sleep=1", "hydra.launcher.n_jobs=2")
    code, _, err = run(place, *words, CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert code == 0, err
    assert sorted(about(place, job)["gpus"] for job in range(2)) == ["4,5", "6,7"]
    assert (place / "swept" / "0" / "output.log").is_file()


def test_a_sweep_file_starts_a_sweep(place):
    code, _, err = run(place, "sweep=two")
    assert code == 0, err
    assert {row["x"] for row in table(place)} == {"1", "2"}
    assert about(place, 0)["mode"] == "RunMode.RUN"  # although the file sets MULTIRUN


def test_a_sweep_under_torchrun_is_an_error(place):
    code, _, err = run(place, "-m", "x=1,2", TORCHELASTIC_RUN_ID="1")
    assert code == 1 and "without torchrun" in err
    assert not (place / "swept" / "0").exists()


def test_sigterm_ends_the_jobs(place):
    process = start(place, "-m", "x=1,2", "sleep=60")
    deadline = time.monotonic() + 60
    while not (place / "swept" / "0" / "about.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.2)
    job = about(place, 0)["pid"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(job, 0)
    assert not (place / "swept" / "1").exists()


def test_an_optuna_search_runs_and_resumes(place):
    optuna = pytest.importorskip("optuna")
    words = ("-m", "hydra/sweeper=optuna", "x=interval(0,8)", "y=choice(0,5)", "fails=3")
    code, out, err = run(place, *words, "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2")
    assert code == 0, err
    assert len(table(place)) == 3 and "best: job" in out
    code, _, err = run(place, *words, "hydra.sweeper.n_trials=5")
    assert code == 0, err
    backend = optuna.storages.journal.JournalFileBackend(str(place / "swept" / "study.log"))
    study = optuna.load_study(study_name="swept", storage=optuna.storages.JournalStorage(backend))
    assert len(study.trials) == 5 and study.direction.name == "MINIMIZE"
    for trial in study.trials:
        x, y = trial.params["x"], int(trial.params["y"])
        assert 0 <= x <= 8 and y in (0, 5)
        assert trial.value == pytest.approx((x - 3) ** 2 + y)


def test_a_search_takes_the_published_plugins_keys(place):
    optuna = pytest.importorskip("optuna")
    words = ("-m", "hydra/sweeper=optuna", "x=interval(0,8)", "hydra.sweeper.n_trials=2")
    settings = {
        "sampler._target_": "optuna.samplers.RandomSampler",
        "sampler.seed": 7,
        "direction": "maximize",
        "study_name": "mine",
        "storage": "sqlite:///study.db",
    }
    keys = [f"hydra.sweeper.{key}={value}" for key, value in settings.items()]
    code, _, err = run(place, *words, *keys)
    assert code == 0, err
    study = optuna.load_study(study_name="mine", storage=f"sqlite:///{place / 'study.db'}")
    assert study.direction.name == "MAXIMIZE" and len(study.trials) == 2
    expected = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=7))
    trials = [expected.ask() for _ in range(2)]
    assert [t.params["x"] for t in study.trials] == [t.suggest_float("x", 0, 8) for t in trials]


def test_an_impossible_number_of_trials_is_an_error(place):
    words = ("-m", "hydra/sweeper=optuna", "x=interval(0,8)", "hydra.sweeper.n_trials=0")
    code, _, err = run(place, *words)
    assert code == 1 and "both must be at least 1" in err


def test_a_search_without_optuna_says_what_to_install(place):
    (place / "optuna.py").write_text("raise ModuleNotFoundError('no optuna', name='optuna')")
    code, _, err = run(
        place, "-m", "hydra/sweeper=optuna", "x=interval(0,8)", PYTHONPATH=f"{place}:{SOURCE}"
    )
    assert code == 1 and "pip install -e '.[sweep]'" in err
