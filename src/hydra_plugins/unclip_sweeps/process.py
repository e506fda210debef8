"""A launcher that runs each job of a sweep in a new process, so that sweeps work with DDP.

In one process, Lightning would start its ranks with the sweep's own command line, and each rank
would run the whole sweep.
"""

import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, configure_log, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from hydra_plugins.unclip_sweeps.jobs import Job, Outcome, write_table

log = logging.getLogger(__name__)


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
        self.outcomes: list[Outcome] = []  # of all batches of the sweep

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
        jobs = [
            self._job(folder, number, overrides)
            for number, overrides in enumerate(job_overrides, start=initial_job_idx)
        ]
        try:
            outcomes = self.run(jobs)
        finally:
            if self.outcomes:
                print(write_table(folder, self.outcomes), flush=True)
        return [outcome.as_return() for outcome in outcomes]

    def _job(self, folder: Path, number: int, overrides: Sequence[str]) -> Job:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        own = filter_overrides(list(overrides))  # without those of hydra.*
        return Job(number, tuple(own), folder / str(config.hydra.sweep.subdir), config)

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Run the jobs, `n_jobs` at a time. Ctrl-C and SIGTERM end them and start no others."""
        waiting, slots = list(jobs), list(range(self.n_jobs))
        running: dict[int, tuple[Job, subprocess.Popen, float]] = {}
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            while waiting or running:
                while waiting and slots:
                    slot, job = slots.pop(0), waiting.pop(0)
                    running[slot] = (job, self._start(job, slot), time.monotonic())
                time.sleep(0.05)
                for slot, (job, process, started) in list(running.items()):
                    if process.poll() is not None:
                        self._note(job, process.returncode, started)
                        slots.append(slot)
                        del running[slot]
        finally:
            for _, process, _ in running.values():
                process.terminate()  # a training run then saves a checkpoint
            for job, process, started in running.values():
                self._note(job, process.wait(), started)
            signal.signal(signal.SIGTERM, previous)
        return sorted(self.outcomes[-len(jobs) :], key=lambda outcome: outcome.job.number)

    def _start(self, job: Job, slot: int) -> subprocess.Popen:
        log.info("#%d: %s", job.number, shlex.join(job.overrides))
        from unclip.launcher import without_ranks

        environment = without_ranks()
        settings: dict[str, Any] = {}
        if self.n_jobs > 1:
            job.folder.mkdir(parents=True, exist_ok=True)
            output = open(job.folder / "output.log", "w")  # noqa: SIM115 (the child's)
            settings = {"stdout": output, "stderr": subprocess.STDOUT}
            gpus = visible_gpus()
            share = gpus[slot * len(gpus) // self.n_jobs : (slot + 1) * len(gpus) // self.n_jobs]
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(share or [gpus[slot % len(gpus)]])
        return subprocess.Popen(job.command(self.overrides), env=environment, **settings)

    def _note(self, job: Job, code: int, started: float) -> None:
        value = None if code else job.objective()
        self.outcomes.append(Outcome(job, code, time.monotonic() - started, value))


def visible_gpus() -> list[str]:
    """Return the names of the visible GPUs, as in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _interrupt(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


DEFAULTS = {"_target_": f"{__name__}.ProcessLauncher", "n_jobs": 1, "overrides": []}
ConfigStore.instance().store("process", DEFAULTS, group="hydra/launcher", provider="unclip")
