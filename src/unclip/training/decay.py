"""The decay of a warm-up-stable-decay run, which starts when a run resumes with `decay_steps`.

The run's record in each checkpoint holds the decay, so that a killed decay continues to its end.
Light to import: a run that cannot resume says so in seconds.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from unclip.training.resuming import LAST, STABLE, ResumeError, is_whole, read_checkpoint


class Decay(NamedTuple):
    """Where the learning rate decays.

    Attributes:
        steps: length of the decay; 0 for none.
        start: step of the checkpoint that the decay was started from; None for a decay that ends
            at the run's `max_steps`.
    """

    steps: int
    start: int | None = None

    def trainer_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Let a trainer with these settings stop at the end of the decay."""
        if self.start is None:
            return dict(settings)
        return {**settings, "max_steps": self.start + self.steps, "effort": 1.0}


def resumed_decay(
    checkpoint: Path | None, steps: int, *, folder: Path, anyway: bool = False
) -> tuple[Path | None, Decay]:
    """Choose between starting a decay and continuing the one that a checkpoint is in.

    Args:
        checkpoint: checkpoint that the run resumes from; None for a new run.
        steps: length of the decay that the run asks for; 0 for none.
        folder: folder of the run.
        anyway: start another decay even if the checkpoint is in one.

    Returns:
        The checkpoint to resume from, and the decay. The checkpoint is last.ckpt of `folder` if
        that is in the very decay that `checkpoint` would start.

    Raises:
        ResumeError: the checkpoint is in a decay of another length.
    """
    if checkpoint is None:
        return None, Decay(steps)
    step, before = _read(checkpoint)
    if before.steps == steps:
        return checkpoint, before
    if before.steps and not anyway:
        stable = checkpoint.with_name(STABLE)
        earlier = f"resume={stable} for the run before the decay, " if stable.is_file() else ""
        raise ResumeError(
            f"{checkpoint} is of a run that decays over {before.steps} steps: give "
            f"schedule.decay_steps={before.steps} to continue it, {earlier}or add "
            "resume_anyway=true"
        )
    if not steps:
        return checkpoint, Decay(0)
    decay, last = Decay(steps, step), folder / LAST
    if last != checkpoint and last.is_file() and is_whole(last) and _read(last)[1] == decay:
        return last, decay
    return checkpoint, decay


def keep_stable(checkpoint: Path, decay: Decay, folder: Path) -> None:
    """Keep the checkpoint that a decay starts from as stable.ckpt, to train or decay it again."""
    stable = folder / STABLE
    if _read(checkpoint)[0] != decay.start or (stable.exists() and stable.samefile(checkpoint)):
        return
    stable.unlink(missing_ok=True)
    try:
        os.link(checkpoint, stable)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(checkpoint, stable)


def _read(checkpoint: Path) -> tuple[int, Decay]:
    """Load the step of a checkpoint and the decay that it is in."""
    saved = read_checkpoint(checkpoint)
    decay = json.loads(saved.get("run", "{}")).get("decay", {"steps": 0})
    return saved["global_step"], Decay(**decay)
