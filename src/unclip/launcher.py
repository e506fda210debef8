"""How this process was started: alone, by Lightning as one of its ranks, by torchrun or by srun.

It imports neither torch nor Lightning, which trust these variables even if they are stale.
"""

import os
import sys

# Environment variables that tell a process its rank, and others of a group of ranks.
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
_GROUP = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "MASTER_ADDR", "MASTER_PORT")


class LaunchError(ValueError):
    """A launcher started another number of processes than the settings ask for."""


def started_by() -> str | None:
    """Return "torchrun" or "srun" if it started this process as one of several, else None."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    several = int(os.environ.get("SLURM_NTASKS", 1)) > 1
    return "srun" if several and not interactive else None


def settle_rank(devices: int | str, nodes: int = 1) -> None:
    """Remove the variables of other launchers than this process's, such as a stale RANK.

    Call it first: Lightning reads RANK when it is imported, also if the trainer has one device.

    Args:
        devices: number of devices per node; "auto" or a list of devices is not checked.
        nodes: number of nodes.

    Raises:
        LaunchError: each of the launcher's processes would do all the work, or wait for others.
    """
    launcher, single = started_by(), str(devices) == "1" and nodes == 1
    own = {"torchrun": _RANKS[:4], "srun": _RANKS[4:], None: () if single else _RANKS[1:4]}
    if launcher is not None:
        count = int(os.environ["WORLD_SIZE" if launcher == "torchrun" else "SLURM_NTASKS"])
        expected = int(devices) * nodes if str(devices).isdecimal() else count
        if launcher == "srun" and (count != expected or "SLURM_NTASKS_PER_NODE" not in os.environ):
            raise LaunchError(
                f"srun starts {count} tasks, and each would do all the work: add trainer=slurm and "
                "start one task per device with --ntasks-per-node=DEVICES, or start one task in "
                "all with --ntasks=1"
            )
        if count != expected:
            local = os.environ.get("LOCAL_WORLD_SIZE", count)
            raise LaunchError(
                f"torchrun starts {count} processes, but the settings ask for {expected}: add "
                f"trainer=ddp trainer.devices={local} (and +trainer.num_nodes=NODES), or start one "
                "process without torchrun"
            )
    others = [name for name in _RANKS if name not in own[launcher]]
    if stale := [name for name in others if os.environ.pop(name, "0") != "0"]:
        print(f"ignored, because no launcher set it: {', '.join(stale)}", file=sys.stderr)


def is_first_rank() -> bool:
    """Return whether this process is rank 0; call `settle_rank` before."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def without_ranks() -> dict[str, str]:
    """Return this process's environment without the variables that make it a rank."""
    return {name: text for name, text in os.environ.items() if name not in (*_RANKS, *_GROUP)}
