"""Which folder a run has, and whether it goes on from a checkpoint that is there.

Light to import: a run that cannot go on says so in seconds.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
STABLE = "stable.ckpt"  # where a decay of the learning rate started
FINISHED = "objective.json"  # in the folder of a run that has come to its end
AUTO = "auto"

# What tells a process its number among those that train together, and what else of them.
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
_OTHERS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS", "MASTER_ADDR", "MASTER_PORT")


class ResumeError(ValueError):
    """A run that does not go on from a checkpoint; the text says why, and what to do."""


class CheckpointError(OSError):
    """A checkpoint cannot be written; the one before it is still there."""


def folder_of(parent: Path, config: Mapping[str, Any]) -> Path:
    """The folder of a configuration's run: the same command finds what it was cut off from.

    It is named after the configuration, and numbered from 2 on when such a run was finished before.
    All ranks come to the same answer, whoever of them asks first.
    """
    name = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        if not (folder / FINISHED).exists():
            return folder


def checkpoint_of(folder: Path, resume: str | None) -> Path | None:
    """What a run goes on from, or None for a new one.

    Args:
        folder: the run's.
        resume: a checkpoint's path, "auto" for that of the run's folder, None for a new run.

    Raises:
        FileNotFoundError: a checkpoint was named that does not exist.
        ResumeError: there are checkpoints, and none of them can be read.
    """
    if resume is None:
        return None
    named = folder / LAST if resume == AUTO else Path(resume)
    if resume != AUTO and not named.is_file():
        raise FileNotFoundError(f"resume={resume}: there is no such file")
    names = [named.name, PREVIOUS] if named.name == LAST else [named.name]
    there = [path for path in map(named.with_name, names) if path.is_file()]
    for path in there:
        if is_whole(path):
            return path
        if is_first_rank():
            print(f"{path} is torn or no checkpoint: passed over", flush=True)
    if there:
        raise ResumeError(
            f"none of {', '.join(map(str, there))} can be read: resume=null starts the run anew"
        )
    return None


def is_whole(path: Path) -> bool:
    """Whether a checkpoint has every byte as it was written, by the checksums in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def check_same_run(
    path: Path, record: Mapping[str, Any], *, max_steps: int, anyway: bool = False
) -> None:
    """Compares a checkpoint's run with the one that wants to go on from it.

    Args:
        path: the checkpoint.
        record: of the run, as `RunRecord` writes it into checkpoints; its "decay" may change.
        max_steps: of the run.
        anyway: go on whatever has changed.

    Raises:
        ResumeError: code in the file, a finished run, or one of another configuration or data set.
    """
    saved = read_checkpoint(path)
    if saved["global_step"] >= max_steps:
        raise ResumeError(
            f"{path} is of a finished run, of {saved['global_step']} steps: resume=null starts "
            "anew, and a larger trainer.max_steps with resume_anyway=true goes on"
        )
    if anyway:
        return
    if "run" not in saved:
        raise ResumeError(f"{path} does not say what run it is of: add resume_anyway=true")
    before, now = json.loads(saved["run"]), json.loads(json.dumps(record))
    changed = list(_differences(*({**run, "decay": None} for run in (before, now))))
    if changed:
        more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
        raise ResumeError(
            f"{path} is of another run: {'; '.join(changed[:6])}{more}. Give the command that it "
            "was started with (config.yaml beside it), or add resume_anyway=true to go on with "
            "these changes"
        )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint; tensors are read from the file when they are used.

    Raises:
        ResumeError: the file has code in it.
    """
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ResumeError(
            f"{path} holds more than tensors and plain values, and could run code: nothing of it "
            "was loaded"
        ) from None


def _differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            yield from _differences(
                before.get(name), now.get(name), f"{key}.{name}" if key else name
            )
    elif before != now:
        name = key.removeprefix("config.")
        if name == "data_set":
            yield "the shards are not those that it was trained on"
        else:
            yield f"{name} was {json.dumps(before)}, is {json.dumps(now)}"


def is_first_rank() -> bool:
    """Whether this process is rank 0, by what its launcher tells it."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def without_ranks() -> dict[str, str]:
    """This process's environment, but for what tells it that it is a rank."""
    return {name: text for name, text in os.environ.items() if name not in (*_RANKS, *_OTHERS)}


@contextlib.contextmanager
def claimed(folder: Path, *, anew: bool = False) -> Iterator[None]:
    """Holds a run's folder while the run lasts, on rank 0, and clears what kills left behind.

    A record lock, not flock: workers that outlive a killed run for seconds do not hold it.

    Args:
        folder: the run's.
        anew: delete the checkpoints of an earlier run in it.

    Raises:
        ResumeError: another process is at this run.
    """
    if not is_first_rank():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ResumeError(
                f"{folder}: another process is at this very run; a second one beside it needs "
                "another seed, or a folder of its own: hydra.run.dir=FOLDER"
            ) from None
        for path in folder.glob(f".{LAST}.*.tmp"):
            path.unlink()
        if anew:
            for name in (LAST, PREVIOUS, STABLE, FINISHED):
                (folder / name).unlink(missing_ok=True)
        yield
