"""Jobs of a sweep and their outcomes."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class Outcome(NamedTuple):
    """Exit code, duration and objective of a job; `value` is None if it was not measured."""

    job: Job
    code: int
    seconds: float
    value: float | None

    def as_return(self) -> JobReturn:
        """Convert to Hydra's type, which raises an error when the value of a failed job is read."""
        returned = JobReturn(
            overrides=list(self.job.overrides),
            cfg=self.job.config,
            working_dir=str(self.job.folder),
        )
        returned.status = JobStatus.FAILED if self.code else JobStatus.COMPLETED
        returned.return_value = self.value
        if self.code:
            returned.return_value = ChildProcessError(
                f"job {self.job.number} of the sweep failed with exit code {self.code}: "
                f"{shlex.join(self.job.overrides)} (in {self.job.folder})"
            )
        return returned


def load_objective(folder: Path) -> float | None:
    """Load the objective from a run folder."""
    try:
        value: Any = json.loads((folder / RESULT).read_text(encoding="utf-8"))["value"]
    except FileNotFoundError:
        return None
    return None if value is None else float(value)


def select(config: DictConfig, key: str, default: Any = None) -> Any:
    """Return a value of a job's configuration, or the default."""
    return OmegaConf.select(config, key, default=default)
