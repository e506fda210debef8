"""A launcher that runs each job of a sweep in a new process, so that sweeps work with DDP.

In one process, Lightning would start its ranks with the sweep's own command line, and each rank
would run the whole sweep.
"""

import csv
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

RESULT = "objective.json"  # written by the script into its run folder: {"name": …, "value": …}

log = logging.getLogger(__name__)


@dataclass
class Job:
    """A job of a sweep: its number, overrides, run folder, configuration and, at its end, outcome.

    `overrides` lacks those of hydra.* and of the launcher; `value` is None if it was not measured.
    """

    number: int
    overrides: list[str]
    folder: Path
    config: DictConfig
    code: int = 0
    seconds: float = 0.0
    value: float | None = None

    def command(self, more: Sequence[str]) -> list[str]:
        """Return the command line of the job alone; {folder} in `more` becomes its run folder."""
        last = ("hydra.mode=RUN", 'hydra.run.dir="{folder}"')
        added = (word.replace("{folder}", str(self.folder)) for word in (*more, *last))
        return [sys.executable, os.path.abspath(sys.argv[0]), *self.overrides, *added]

    def end(self, code: int, started: float) -> None:
        """Note the exit code, the duration and the objective that the job wrote, if it did."""
        self.code, self.seconds = code, time.monotonic() - started
        path = self.folder / RESULT
        if code == 0 and path.exists():
            self.value = json.loads(path.read_text(encoding="utf-8"))["value"]

    def as_return(self) -> JobReturn:
        """Convert to Hydra's type, which raises an error when the value of a failed job is read."""
        returned = JobReturn(self.overrides, cfg=self.config, working_dir=str(self.folder))
        returned.status = JobStatus.FAILED if self.code else JobStatus.COMPLETED
        error = ChildProcessError(
            f"job {self.number} of the sweep failed with exit code {self.code}: "
            f"{shlex.join(self.overrides)} (in {self.folder})"
        )
        returned.return_value = error if self.code else self.value
        return returned


class ProcessLauncher(Launcher):
    """Run jobs as processes, then print a table of their results.

    A failed job does not stop the others; the sweep ends with its error.

    Args:
        n_jobs: number of jobs that run in parallel; they share the visible GPUs evenly.
        overrides: overrides that are added to every job; {folder} is replaced by its run folder.
    """

    def __init__(self, n_jobs: int, overrides: Sequence[str]):
        if n_jobs < 1:
            raise ValueError(f"hydra.launcher.n_jobs is {n_jobs}; it must be at least 1")
        self.n_jobs = n_jobs
        self.overrides = list(overrides)
        self.ended: list[Job] = []  # of all batches of the sweep

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Store the sweep's configuration."""
        self.hydra_context = hydra_context
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Run a batch of jobs; under torchrun or srun, raise ValueError."""
        from unclip.launcher import started_by  # it imports torch

        if launcher := started_by():
            raise ValueError(
                f"the jobs of a sweep start their ranks themselves: run the sweep without "
                f"{launcher}, with trainer=ddp"
            )
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        folder = Path(str(self.config.hydra.sweep.dir)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        jobs = []
        for number, overrides in enumerate(map(list, job_overrides), start=initial_job_idx):
            config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            own = list(filter_overrides(overrides))
            jobs.append(Job(number, own, folder / str(config.hydra.sweep.subdir), config))
        try:
            self.run(jobs)
        finally:
            if self.ended:
                print(write_table(folder, self.ended), flush=True)
        return [job.as_return() for job in jobs]

    def run(self, jobs: Sequence[Job]) -> None:
        """Run the jobs, `n_jobs` at a time. Ctrl-C and SIGTERM end them and start no others."""
        waiting, slots = list(jobs), list(range(self.n_jobs))
        running: dict[int, tuple[Job, subprocess.Popen, float]] = {}
        previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            while waiting or running:
                while waiting and slots:
                    slot, job = slots.pop(0), waiting.pop(0)
                    running[slot] = (job, self._start(job, slot), time.monotonic())
                time.sleep(0.05)
                for slot, (job, process, started) in list(running.items()):
                    if process.poll() is not None:
                        job.end(process.returncode, started)
                        self.ended.append(job)
                        slots.append(slot)
                        del running[slot]
        finally:
            for _, process, _ in running.values():
                process.terminate()  # a training run then saves a checkpoint
            for job, process, started in running.values():
                job.end(process.wait(), started)
                self.ended.append(job)
            signal.signal(signal.SIGTERM, previous)

    def _start(self, job: Job, slot: int) -> subprocess.Popen:
        from unclip.launcher import without_ranks

        log.info("#%d: %s", job.number, shlex.join(job.overrides))
        environment, output = without_ranks(), None
        if self.n_jobs > 1:
            job.folder.mkdir(parents=True, exist_ok=True)
            output = open(job.folder / "output.log", "w")  # noqa: SIM115 (the child's)
            if gpus := visible_gpus():
                first, end = (k * len(gpus) // self.n_jobs for k in (slot, slot + 1))
                share = gpus[first:end] or [gpus[slot % len(gpus)]]
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(share)
        command = job.command(self.overrides)
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def visible_gpus() -> list[str]:
    """Return the names of the visible GPUs, as in CUDA_VISIBLE_DEVICES."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return list(filter(None, os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def write_table(folder: Path, jobs: Sequence[Job]) -> str:
    """Write FOLDER/summary.csv, best job first, and return the same table as text.

    There is a column for each setting that differs between jobs. The column after them is named by
    the `objective` of the jobs, whose `direction` decides the order.
    """
    config = jobs[0].config
    sign = 1 if OmegaConf.select(config, "direction") == "minimize" else -1
    jobs = sorted(jobs, key=lambda job: (job.value is None, sign * (job.value or 0.0), job.number))
    settings = [dict(word.partition("=")[::2] for word in job.overrides) for job in jobs]
    keys = dict.fromkeys(key for one in settings for key in one)
    varying = [key for key in keys if len({one.get(key) for one in settings}) > 1] or list(keys)
    objective = OmegaConf.select(config, "objective") or "objective"
    rows = [["job", *varying, objective, "minutes", "state"]]
    for job, chosen in zip(jobs, settings, strict=True):
        values = [chosen.get(key, "") for key in varying]
        measured = "" if job.value is None else f"{job.value:.6g}"
        state = f"failed ({job.code})" if job.code else "done"
        rows.append([str(job.number), *values, measured, f"{job.seconds / 60:.2f}", state])
    with open(folder / "summary.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
    lines = ["  ".join(row).rstrip() for row in cells]
    return "\n".join([*lines, f"(also in {folder / 'summary.csv'})"])


DEFAULTS = {"_target_": f"{__name__}.ProcessLauncher", "n_jobs": 1, "overrides": []}
ConfigStore.instance().store("process", DEFAULTS, group="hydra/launcher", provider="unclip")
