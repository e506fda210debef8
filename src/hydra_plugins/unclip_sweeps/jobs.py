"""Jobs of a sweep, their outcomes, and the table of them: printed, and written to summary.csv."""

import csv
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

RESULT = "objective.json"  # written by the script into its run folder: {"name": …, "value": …}


class Job(NamedTuple):
    """A job of a sweep.

    Attributes:
        number: number of the job in the sweep, from 0.
        overrides: overrides of the job, without those that the launcher adds.
        folder: run folder of the job.
        config: composed configuration of the job.
    """

    number: int
    overrides: tuple[str, ...]
    folder: Path
    config: DictConfig

    def command(self, overrides: Sequence[str] = ()) -> list[str]:
        """Return the command line of the job alone.

        Args:
            overrides: overrides to add; {folder} is replaced by the run folder.
        """
        last = ("hydra.mode=RUN", 'hydra.run.dir="{folder}"')
        added = (word.replace("{folder}", str(self.folder)) for word in (*overrides, *last))
        return [sys.executable, os.path.abspath(sys.argv[0]), *self.overrides, *added]

    def settings(self) -> dict[str, str]:
        """Return the overrides as a dict."""
        return dict(word.partition("=")[::2] for word in self.overrides)

    def objective(self) -> float | None:
        """Load the objective that the job wrote into its run folder, if it did."""
        path = self.folder / RESULT
        value = json.loads(path.read_text(encoding="utf-8"))["value"] if path.exists() else None
        return None if value is None else float(value)


class Outcome(NamedTuple):
    """Exit code, duration and objective of a job; `value` is None if it was not measured."""

    job: Job
    code: int
    seconds: float
    value: float | None

    def as_return(self) -> JobReturn:
        """Convert to Hydra's type, which raises an error when the value of a failed job is read."""
        number, overrides, folder, config = self.job
        returned = JobReturn(overrides=list(overrides), cfg=config, working_dir=str(folder))
        returned.status = JobStatus.FAILED if self.code else JobStatus.COMPLETED
        returned.return_value = self.value
        if self.code:
            returned.return_value = ChildProcessError(
                f"job {number} of the sweep failed with exit code {self.code}: "
                f"{shlex.join(overrides)} (in {folder})"
            )
        return returned


def write_table(folder: Path, outcomes: Sequence[Outcome]) -> str:
    """Write FOLDER/summary.csv, best job first, and return the same table as text.

    There is a column for each setting that differs between jobs. The column after them is named by
    the `objective` of the jobs, whose `direction` decides the order.
    """
    config = outcomes[0].job.config
    objective = OmegaConf.select(config, "objective") or "objective"
    sign = 1 if OmegaConf.select(config, "direction") == "minimize" else -1
    settings = [outcome.job.settings() for outcome in outcomes]
    keys = dict.fromkeys(key for one in settings for key in one)
    varying = [key for key in keys if len({one.get(key) for one in settings}) > 1] or list(keys)
    rows = [["job", *varying, objective, "minutes", "state"]]
    order = lambda o: (o.value is None, sign * (o.value or 0.0), o.job.number)  # noqa: E731
    for job, code, seconds, value in sorted(outcomes, key=order):
        measured = "" if value is None else f"{value:.6g}"
        state = f"failed ({code})" if code else "done"
        chosen = [job.settings().get(key, "") for key in varying]
        rows.append([str(job.number), *chosen, measured, f"{seconds / 60:.2f}", state])
    with open(folder / "summary.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, f"(also in {folder / 'summary.csv'})"])
