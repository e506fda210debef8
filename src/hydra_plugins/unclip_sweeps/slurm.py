"""A launcher that hands each job of a sweep to Slurm through submitit (an extra)."""

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from hydra_plugins.unclip_sweeps.jobs import Job, Outcome, read_value
from hydra_plugins.unclip_sweeps.process import ProcessLauncher


@dataclass
class SlurmLauncherConf:
    """What `hydra.launcher.KEY=VALUE` can change."""

    _target_: str = "hydra_plugins.unclip_sweeps.slurm.SlurmLauncher"
    more: list[str] = field(default_factory=list)
    cluster: str = "slurm"
    minutes: int = 24 * 60
    gpus: int = 1
    cpus: int = 8
    memory_gib: int = 64
    partition: str | None = None
    parallel: int = 64


class SlurmLauncher(ProcessLauncher):
    """Submits jobs, each on one machine, and waits for all of them.

    A job starts its ranks itself (trainer=ddp), so Slurm is asked for one task with `gpus` GPUs and
    Lightning is not told of Slurm. Ctrl-C cancels what has not ended.

    Args:
        more: overrides that every job gets.
        cluster: "slurm", or "local" to try it without Slurm.
        minutes: after which Slurm ends a job.
        gpus: of a job.
        cpus: of a job.
        memory_gib: of a job.
        partition: of Slurm's; None for the usual one.
        parallel: jobs that run at a time, at most.
    """

    def __init__(
        self,
        more: Sequence[str],
        *,
        cluster: str,
        minutes: int,
        gpus: int,
        cpus: int,
        memory_gib: int,
        partition: str | None,
        parallel: int,
    ):
        super().__init__(parallel=parallel, more=more)
        self.cluster = cluster
        self.resources = {
            "timeout_min": minutes,
            "gpus_per_node": gpus,
            "cpus_per_task": cpus,
            "mem_gb": memory_gib,
            "slurm_array_parallelism": parallel,
            **({"slurm_partition": partition} if partition else {}),
        }

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Submits the jobs as one array and waits."""
        try:
            import submitit
        except ModuleNotFoundError as error:
            raise ValueError(f"{error.name} is not installed: pip install -e '.[sweep]'") from None
        executor = submitit.AutoExecutor(
            folder=jobs[0].folder.parent / "submitit", cluster=self.cluster
        )
        executor.update_parameters(name="unclip", **self.resources)
        commands = [job.command(self.more) for job in jobs]
        started = time.monotonic()
        submitted = executor.map_array(_run, commands)
        try:
            return [
                self._finished(job, handle, started)
                for job, handle in zip(jobs, submitted, strict=True)
            ]
        except BaseException:
            for handle in submitted:
                handle.cancel()
            raise

    def _finished(self, job: Job, handle: Any, started: float) -> Outcome:
        handle.wait()
        failed = handle.exception() is not None
        code = 1 if failed else handle.result()
        value = read_value(job.folder) if code == 0 else None
        outcome = Outcome(job, code, time.monotonic() - started, value)
        self.outcomes.append(outcome)
        return outcome


def _run(command: list[str]) -> int:
    from unclip.training.resume import without_ranks  # it imports torch

    return subprocess.run(command, env=without_ranks(), check=False).returncode


ConfigStore.instance().store(
    group="hydra/launcher", name="slurm", node=SlurmLauncherConf, provider="unclip"
)
