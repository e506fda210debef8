"""The processes that share one evaluation: who takes which part, and how rank 0 gets all of it.

Plain torch.distributed over gloo, as `torchrun` starts it. A list is cut into the same blocks
whatever the number of processes, and rank r takes block r, r + world, …: what is computed from a
block does not depend on who computes it.
"""

import atexit
import os
import sys
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_LONGEST_WAIT = timedelta(days=7)  # ranks finish their samples hours apart


class Ranks(NamedTuple):
    """This process among its like."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def blocks(self, count: int, size: int) -> list[range]:
        """This rank's share of 0..count - 1, in blocks of `size`."""
        starts = range(self.rank * size, count, self.world * size)
        return [range(start, min(start + size, count)) for start in starts]

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value, on rank 0; None on the others."""
        if self.world == 1:
            return [value]
        gathered = [None] * self.world if self.first else None
        dist.gather_object(value, gathered)
        return gathered

    def wait(self) -> None:
        """Goes on when every rank has come here."""
        if self.world > 1:
            dist.barrier()

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def device(self, name: str | None) -> torch.device:
        """Where this rank computes; None is its own GPU if there is one."""
        if name is not None:
            return torch.device(name)
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def start_ranks(devices: int | str) -> None:
    """Starts the program again as one process for each device, in place of this one.

    Does nothing for one device, or where it is one of several already.

    Args:
        devices: how many; "auto" for as many as there are GPUs.
    """
    count = torch.cuda.device_count() if devices == "auto" else int(devices)
    if count < 2 or "WORLD_SIZE" in os.environ:
        return
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


def gather_rows(rows: Tensor) -> Tensor:
    """All ranks' rows, in the order of ranks, on every rank's CPU; without ranks just these.

    A distance is biased by the number of pictures: measured on each rank and averaged it would
    grow with the number of ranks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts = [rows] * dist.get_world_size()
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat(parts)


def joined() -> Ranks:
    """This process's place, by what `torchrun` put into the environment; alone without it.

    The processes meet once and stay together to the program's end, whatever jobs a sweep has: in
    torchrun's store they would find the addresses of their first meeting, and wait for ever.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Ranks()
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
        atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), world)
