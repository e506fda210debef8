"""Choose a run's folder, find the checkpoint to resume from, and start or continue a decay.

Lightning and torch are imported only when they are needed: most errors are raised before that.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from unclip.launcher import is_first_rank

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
STABLE = "stable.ckpt"  # the checkpoint that a decay of the learning rate started from
FINISHED = "objective.json"  # in the folder of a finished run
METRICS = "logs/metrics.csv"
AUTO = "auto"


class ResumeError(ValueError):
    """A run cannot resume from a checkpoint; the message says why, and how to fix it."""


class CheckpointError(OSError):
    """A checkpoint cannot be written; the previous one is kept."""


def choose_run_dir(parent: Path, config: Mapping[str, Any]) -> Path:
    """Return the folder of a configuration's run, so that the same command resumes it.

    Its name is a hash of the configuration, with a number from 2 on if such a run has finished.
    All ranks choose the same folder.
    """
    name = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    folder, number = parent / name, 1
    while (folder / FINISHED).exists():
        number += 1
        folder = parent / f"{name}-{number}"
    return folder


@contextlib.contextmanager
def lock_run_dir(folder: Path, *, restart: bool = False) -> Iterator[None]:
    """Lock a run folder on rank 0, and delete temporary files of killed runs.

    It is a record lock, not flock: workers that outlive a killed run for seconds do not hold it.
    With `restart`, the checkpoints and the log of an earlier run in this folder are deleted.
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
                f"{folder}: another process is running this command. For a second run, choose "
                "another seed or another folder: hydra.run.dir=FOLDER"
            ) from None
        stale = list(folder.glob(f".{LAST}.*.tmp"))
        if restart:
            stale += [folder / name for name in (LAST, PREVIOUS, STABLE, FINISHED, METRICS)]
        for path in stale:
            path.unlink(missing_ok=True)
        yield


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """Return the newest intact checkpoint to resume from, or None for a new run.

    `resume` is the path of a checkpoint, "auto" for that of the run folder, or None for a new run.
    """
    if resume is None:
        return None
    named = folder / LAST if resume == AUTO else Path(resume)
    names = [named.name, PREVIOUS] if named.name == LAST else [named.name]
    existing = [path for path in map(named.with_name, names) if path.is_file()]
    for path in existing:
        if is_intact(path):
            return path
        if is_first_rank():
            print(f"{path} is damaged or not a checkpoint: skipped", flush=True)
    if existing:
        raise ResumeError(
            f"none of {', '.join(map(str, existing))} can be loaded: add resume=null to start over"
        )
    return None


def is_intact(path: Path) -> bool:
    """Return whether all bytes of a checkpoint match its checksums.

    Other ranks than the first do not read the tensors; they resume from the first one's choice.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if is_first_rank():
                return archive.testzip() is None
            return all(map(archive.read, (n for n in archive.namelist() if n.endswith(".pkl"))))
    except (OSError, zipfile.BadZipFile):
        return False


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint without executing code; tensors are read when they are used."""
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        message = f"{path} is not a checkpoint of unclip: loading it could run code"
        raise ResumeError(message) from None


def check_same_run(
    path: Path, metadata: Mapping[str, Any], *, max_steps: int, strict: bool = True
) -> None:
    """Raise ResumeError if a checkpoint's run has finished, or is another run than the present one.

    A run that was killed after its last checkpoint, before it was marked as finished, passes.

    With `strict`, the metadata that `RunMetadata` saves must be the same, except for its "decay".
    """
    saved = load_checkpoint(path)
    if saved["global_step"] >= max_steps and path.with_name(FINISHED).exists():
        raise ResumeError(
            f"{path} belongs to a finished run of {saved['global_step']} steps: add resume=null to "
            "start over, or a larger trainer.max_steps and resume_strict=false to train longer"
        )
    if not strict:
        return
    if "run" not in saved:
        raise ResumeError(f"{path} does not describe its run: add resume_strict=false")
    before, now = json.loads(saved["run"]), json.loads(json.dumps(metadata))
    if changed := list(_differences(before | {"decay": None}, now | {"decay": None})):
        more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
        raise ResumeError(
            f"{path} belongs to another run: {'; '.join(changed[:6])}{more}. Use the command that "
            "started it (config.yaml next to it), or add resume_strict=false to resume with these "
            "changes"
        )


def _differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
    elif before != now:
        if key == "data_set":
            yield "the shards are not those of its training"
        else:
            yield f"{key.removeprefix('config.')} was {json.dumps(before)}, is {json.dumps(now)}"


class Decay(NamedTuple):
    """The decay of a warm-up-stable-decay run, which starts when a run resumes with `decay_steps`.

    Checkpoints contain it, so that a killed decay continues to its end.
    """

    steps: int  # 0 for none
    start: int | None = None  # step of the first checkpoint; None: it ends at the run's max_steps

    @property
    def end(self) -> int | None:
        """Last step of the run; None for its `max_steps`."""
        return None if self.start is None else self.start + self.steps


def resume_decay(
    checkpoint: Path | None, steps: int, *, folder: Path, strict: bool = True
) -> tuple[Path | None, Decay]:
    """Start a decay of some steps (0 for none), or continue the decay of a checkpoint.

    With `strict`, another decay within a decay is refused.

    Returns:
        The checkpoint to resume from, None for a new run, and the decay. The checkpoint is
        last.ckpt of the run folder if that is in the same decay that `checkpoint` would start.
    """
    if checkpoint is None:
        return None, Decay(steps)
    step, before = _step_and_decay(checkpoint)
    if before.steps == steps:
        return checkpoint, before
    if before.steps and strict:
        stable = checkpoint.with_name(STABLE)
        earlier = f"resume={stable} for the run before the decay, " if stable.is_file() else ""
        raise ResumeError(
            f"{checkpoint} belongs to a run that decays over {before.steps} steps: use "
            f"schedule.decay_steps={before.steps} to continue it, {earlier}or add "
            "resume_strict=false"
        )
    if not steps:
        return checkpoint, Decay(0)
    decay, last = Decay(steps, step), folder / LAST
    if is_intact(last) and _step_and_decay(last)[1] == decay:
        return last, decay
    return checkpoint, decay


def keep_stable(checkpoint: Path, decay: Decay, folder: Path) -> None:
    """Keep the checkpoint that a decay starts from as stable.ckpt, to train or decay it again."""
    stable = folder / STABLE
    is_kept = stable.exists() and stable.samefile(checkpoint)
    if is_kept or _step_and_decay(checkpoint)[0] != decay.start:
        return
    stable.unlink(missing_ok=True)
    try:
        os.link(checkpoint, stable)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(checkpoint, stable)


def _step_and_decay(checkpoint: Path) -> tuple[int, Decay]:
    saved = load_checkpoint(checkpoint)
    decay = json.loads(saved.get("run", "{}")).get("decay", {"steps": 0})
    return saved["global_step"], Decay(**decay)
