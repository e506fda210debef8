"""The processes that share an evaluation, started by Lightning Fabric.

A list is cut into the same blocks for any number of processes, and rank r takes blocks r,
r + world, …: results do not depend on how many processes there are.
"""

import atexit
import ctypes
import os
import signal
import sys
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from unclip.launcher import settle_rank, started_by

LONGEST_WAIT = timedelta(days=7)  # ranks finish their samples hours apart


class Ranks:
    """This process's rank and world size, and the exchange between ranks."""

    def __init__(self, fabric: Any = None) -> None:  # None: a single process
        self.fabric = fabric
        self.rank = 0 if fabric is None else fabric.global_rank
        self.world = 1 if fabric is None else fabric.world_size

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def blocks(self, count: int, size: int) -> list[range]:
        """Return this rank's blocks of `size` indices out of 0..count - 1."""
        starts = range(self.rank * size, count, self.world * size)
        return [range(start, min(start + size, count)) for start in starts]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value on rank 0, an empty list on the others."""
        if self.world == 1:
            return [value]
        gathered = [None] * self.world if self.first else None
        dist.gather_object(value, gathered)
        return gathered or []

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            self.fabric.barrier()

    def share(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        return value if self.world == 1 else self.fabric.broadcast(value)

    def device(self, name: str | None) -> torch.device:
        """Return the device called `name`; None is this rank's GPU if there is one."""
        if name is not None:
            return torch.device(name)
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", 0 if self.fabric is None else self.fabric.local_rank)


@cache  # the processes of a sweep's jobs meet once and stay together until the program ends
def launch(devices: int | str = 1, accelerator: str = "auto", nodes: int = 1) -> Ranks:
    """Start `devices` processes per node, or join those that torchrun or srun started.

    Raises:
        LaunchError: srun started another number of processes.
    """
    if started_by() == "torchrun":
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    settle_rank(devices, nodes)
    if devices == "auto":
        devices = max(torch.cuda.device_count(), 1)
    if int(devices) * nodes == 1:
        return Ranks()
    from lightning.fabric import Fabric
    from lightning.fabric.strategies.ddp import DDPStrategy

    strategy = DDPStrategy(process_group_backend="gloo", timeout=LONGEST_WAIT)
    settings = {"accelerator": accelerator, "devices": int(devices), "num_nodes": nodes}
    fabric = Fabric(**settings, strategy=strategy, plugins=cluster_environment())
    fabric.launch()
    if fabric.global_rank:
        die_with_parent()
    atexit.register(_destroy_process_group)
    return Ranks(fabric)


def cluster_environment() -> Any:
    """Return Lightning's interface to the launcher of this process."""
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    launcher = started_by()
    if launcher == "torchrun":
        return TorchElasticEnvironment()
    if launcher == "srun":
        return SLURMEnvironment(auto_requeue=False)  # it would save to another folder
    return LightningEnvironment()  # also in a Slurm job of one task


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends; on Linux only.

    Otherwise a rank that hangs would outlive its run.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _destroy_process_group() -> None:
    """End gloo's threads before the process exits; otherwise they can abort it."""
    if dist.is_initialized():
        dist.destroy_process_group()
