"""A launcher that runs each job of a sweep as a fresh process, so that DDP and sweeps mix.

In one process, Lightning's ranks would be started with the sweep's own command line, and each
would go through the whole sweep.
"""

import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, configure_log, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from hydra_plugins.unclip_sweeps.jobs import Job, Outcome, choice, read_value
from hydra_plugins.unclip_sweeps.table import write_table

log = logging.getLogger(__name__)


@dataclass
class ProcessLauncherConf:
    """What `hydra.launcher.KEY=VALUE` can change."""

    _target_: str = "hydra_plugins.unclip_sweeps.process.ProcessLauncher"
    parallel: int = 1
    more: list[str] = field(default_factory=list)


class ProcessLauncher(Launcher):
    """Runs jobs as processes and ends with a table of what came of them.

    A failed job does not stop the others; the sweep then ends with its error.

    Args:
        parallel: jobs at a time; they share the visible GPUs evenly.
        more: overrides that every job gets; {folder} stands for its run folder.
    """

    def __init__(self, parallel: int = 1, more: Sequence[str] = ()):
        if parallel < 1:
            raise ValueError(f"hydra.launcher.parallel is {parallel}; it must be at least 1")
        self.parallel = parallel
        self.more = list(more)
        self.outcomes: list[Outcome] = []  # of the whole sweep, which may come in batches

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keeps what Hydra knows of the sweep."""
        self.hydra_context = hydra_context
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> list[JobReturn]:
        """Runs a batch of jobs.

        Raises:
            ValueError: under torchrun or srun: a sweep's jobs start their ranks themselves.
        """
        if "LOCAL_RANK" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
            raise ValueError(
                "a sweep starts its jobs' ranks itself: run it without torchrun, with trainer=ddp"
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
        subfolder = str(choice(config, "hydra.sweep.subdir"))
        own = filter_overrides(list(overrides))  # without the sweep's hydra.…
        return Job(number, tuple(own), folder / subfolder, config)

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Runs the jobs, `parallel` at a time; Ctrl-C reaches them, too, and starts no more."""
        waiting, free = list(jobs), list(range(self.parallel))
        running: dict[int, tuple[Job, subprocess.Popen, float]] = {}
        done: dict[int, Outcome] = {}
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            while waiting or running:
                while waiting and free:
                    slot, job = free.pop(0), waiting.pop(0)
                    running[slot] = (job, self._start(job, slot), time.monotonic())
                time.sleep(0.05)
                for slot, (job, process, started) in list(running.items()):
                    if process.poll() is not None:
                        done[job.number] = self._note(job, process.returncode, started)
                        free.append(slot)
                        del running[slot]
        finally:
            for _, process, _ in running.values():
                process.terminate()  # a training run saves, and says how to continue
            for job, process, started in running.values():
                self._note(job, process.wait(), started)
            signal.signal(signal.SIGTERM, previous)
        return [done[job.number] for job in jobs]

    def _start(self, job: Job, slot: int) -> subprocess.Popen:
        log.info("#%d: %s", job.number, shlex.join(job.overrides))
        from unclip.training.resume import without_ranks  # it imports torch

        environment = without_ranks()
        settings: dict[str, Any] = {}
        if self.parallel > 1:
            job.folder.mkdir(parents=True, exist_ok=True)
            output = open(job.folder / "output.log", "w")  # noqa: SIM115 (the child's)
            settings = {"stdout": output, "stderr": subprocess.STDOUT}
            gpus = visible_gpus()
            share = gpus[
                slot * len(gpus) // self.parallel : (slot + 1) * len(gpus) // self.parallel
            ]
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(share or [gpus[slot % len(gpus)]])
        return subprocess.Popen(job.command(self.more), env=environment, **settings)

    def _note(self, job: Job, code: int, started: float) -> Outcome:
        value = read_value(job.folder) if code == 0 else None
        outcome = Outcome(job, code, time.monotonic() - started, value)
        self.outcomes.append(outcome)
        return outcome


def visible_gpus() -> list[str]:
    """The GPUs that a process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _interrupt(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


ConfigStore.instance().store(
    group="hydra/launcher", name="process", node=ProcessLauncherConf, provider="unclip"
)
