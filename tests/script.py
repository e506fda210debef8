"""Run scripts of src/ in this process, where imports are paid for only once, and of tests/."""

import csv
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"


def run(command: str, folder: Path) -> None:
    """Run `python src/….py …` in a folder as a user does; a failure raises SystemExit."""
    python, script, *words = shlex.split(command)
    assert python == "python"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(SOURCE)
        patch.setattr(sys, "argv", [script, *words])
        try:
            runpy.run_path(str(SOURCE.parent / script), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise


def run_helper(name: str, *arguments, timeout: float = 280) -> str:
    """Run a script of tests/ as a process on the CPU, and return its output."""
    path = SOURCE.parent / "tests" / name
    folders = (path.parent, SOURCE, SOURCE.parent / "tests")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    words = [sys.executable, path, *map(str, arguments)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def logged(run: Path) -> list[dict[str, str]]:
    """Return the lines of a run's log, without empty cells."""
    with open(run / "logs" / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
