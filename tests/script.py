"""Run a script of src/ as a user does, but in this process: imports are paid for only once."""

import csv
import runpy
import shlex
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"


def run(command: str, folder: Path) -> None:
    """Run `python src/….py …` in a folder; a script that fails raises SystemExit."""
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


def logged(run: Path) -> list[dict[str, str]]:
    """Return the lines of a run's log, without empty cells."""
    with open(run / "logs" / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
