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


def run(place, *words, code=0, **environment):
    """Run the script, which ends with an exit code; return its output and errors."""
    process = start(place, *words, **environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


def about(place, job):
    return json.loads((place / "swept" / str(job) / "about.json").read_text())


def table(place):
    with open(place / "swept" / "summary.csv") as file:
        return list(csv.DictReader(file))


def test_each_job_is_a_new_process_and_the_best_comes_first(place):
    out, _ = run(place, "-m", "x=1,4", "y=0,10", WORLD_SIZE="2", RANK="1")
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
    _, err = run(place, "-m", "x=1,2,3", "fails=2", code=1)
    assert "job 1 of the sweep failed with exit code 7: x=2 fails=2" in err
    assert [row["state"] for row in table(place)] == ["done", "done", "failed (7)"]


def test_jobs_in_parallel_share_the_gpus(place):
    words = ("-m", "x=1,2", "sleep=1", "hydra.launcher.n_jobs=2")
    run(place, *words, CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert sorted(about(place, job)["gpus"] for job in range(2)) == ["4,5", "6,7"]
    assert (place / "swept" / "0" / "output.log").is_file()


def test_a_sweep_file_starts_a_sweep(place):
    run(place, "sweep=two")
    assert {row["x"] for row in table(place)} == {"1", "2"}
    assert about(place, 0)["mode"] == "RunMode.RUN"  # although the file sets MULTIRUN


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["x=1,2"], {"TORCHELASTIC_RUN_ID": "1"}, "without torchrun"),
        (["x=interval(0,8)", "hydra.sweeper.n_trials=0"], {}, "both must be at least 1"),
        (["x=interval(0,8)"], {}, "pip install -e '.[sweep]'"),
    ],
)
def test_a_sweep_that_cannot_run_is_an_error(place, words, environment, said):
    (place / "optuna.py").write_text("raise ModuleNotFoundError('no optuna', name='optuna')")
    sweeper = "optuna" if "interval" in words[0] else "basic"
    _, err = run(place, "-m", f"hydra/sweeper={sweeper}", *words, code=1, **environment)
    assert said in err and not (place / "swept" / "0").exists()


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
    out, _ = run(place, *words, "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2")
    assert len(table(place)) == 3 and "best: job" in out
    run(place, *words, "hydra.sweeper.n_trials=5")
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
    run(place, *words, *(f"hydra.sweeper.{key}={value}" for key, value in settings.items()))
    study = optuna.load_study(study_name="mine", storage=f"sqlite:///{place / 'study.db'}")
    assert study.direction.name == "MAXIMIZE" and len(study.trials) == 2
    expected = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=7))
    trials = [expected.ask() for _ in range(2)]
    assert [t.params["x"] for t in study.trials] == [t.suggest_float("x", 0, 8) for t in trials]
