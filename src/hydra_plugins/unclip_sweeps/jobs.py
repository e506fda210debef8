"""What a job of a sweep is: a command line of its own, a folder, and what came of it."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

RESULT = "objective.json"  # what a script leaves in its run folder: {"name": …, "value": …}


class Job(NamedTuple):
    """A job of a sweep.

    Attributes:
        number: in the sweep, from 0.
        overrides: its part of the command line, without what the launcher adds.
        folder: its run folder.
        config: what it is run with.
    """

    number: int
    overrides: tuple[str, ...]
    folder: Path
    config: DictConfig

    def command(self, more: Sequence[str] = ()) -> list[str]:
        """The command line that runs it, alone; {folder} in `more` stands for its folder."""
        last = ("hydra.mode=RUN", 'hydra.run.dir="{folder}"')
        added = (word.replace("{folder}", str(self.folder)) for word in (*more, *last))
        return [sys.executable, os.path.abspath(sys.argv[0]), *self.overrides, *added]


class Outcome(NamedTuple):
    """What came of a job; `value` is None where the script measured nothing."""

    job: Job
    code: int
    seconds: float
    value: float | None

    def as_return(self) -> JobReturn:
        """The same for Hydra: a failed job raises when its value is asked for."""
        returned = JobReturn(
            overrides=list(self.job.overrides),
            cfg=self.job.config,
            working_dir=str(self.job.folder),
        )
        returned.status = JobStatus.FAILED if self.code else JobStatus.COMPLETED
        returned.return_value = self.value
        if self.code:
            returned.return_value = ChildProcessError(
                f"job {self.job.number} of the sweep ended with code {self.code}: "
                f"{shlex.join(self.job.overrides)} (in {self.job.folder})"
            )
        return returned


def read_value(folder: Path) -> float | None:
    """What the script of that run folder measured."""
    try:
        value: Any = json.loads((folder / RESULT).read_text())["value"]
    except FileNotFoundError:
        return None
    return None if value is None else float(value)


def choice(config: DictConfig, key: str, default: Any = None) -> Any:
    """A value of a job's configuration, if it has one."""
    return OmegaConf.select(config, key, default=default)
