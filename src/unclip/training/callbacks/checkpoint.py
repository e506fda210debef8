"""Checkpoints to resume from: when they are written, how, and of which run they say they are."""

import json
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import distributed

from unclip.batch import Batch
from unclip.files import atomic_write
from unclip.training.callbacks.guard import NonFiniteError
from unclip.training.lightning_compat import (
    is_within_step,
    rewind_to_step,
    sync_logged_step,
    validate_after_batch,
)
from unclip.training.modules import StageModule
from unclip.training.resume import LAST, PREVIOUS, CheckpointError
from unclip.training.sharding import is_sharded

# After these exceptions the weights are in doubt, saving would fail again, or it is not wanted.
UNSAVED = (SystemExit, KeyboardInterrupt, NonFiniteError, CheckpointError)


class AtomicCheckpointIO(CheckpointIO):
    """Write next to the target, sync, rename; load only tensors and plain containers.

    Lightning's own writer goes through the temporary folder. If that is on another disk, a kill
    leaves a truncated file under the final name. The replaced checkpoint is kept as previous.ckpt;
    the one before it is deleted first, so that at most two are on the disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write `checkpoint`; an old file at `path` stays until the new one is on the disk.

        Raises:
            CheckpointError: the disk is full, or the folder is not writable.
        """
        path = Path(path)
        previous = path.with_name(PREVIOUS)
        try:
            with atomic_write(path) as temporary:
                if path.exists():
                    previous.unlink(missing_ok=True)
                with open(temporary, "wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                if path.exists():
                    _link(path, previous)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch turns an OSError into a RuntimeError
            raise CheckpointError(_write_failure(path, checkpoint, error)) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Load a checkpoint onto the CPU, or onto `map_location`.

        Raises:
            FileNotFoundError: there is no such file; a run that should resume never starts over.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no checkpoint {path}")
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint, if it exists."""
        Path(path).unlink(missing_ok=True)


def _link(path: Path, other: Path) -> None:
    """Give the file at `path` a second name; rename it on a file system without links."""
    try:
        os.link(path, other)
    except OSError:
        os.replace(path, other)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, on systems that can open folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_failure(path: Path, checkpoint: dict[str, Any], error: Exception) -> str:
    free = shutil.disk_usage(path.parent).free / 2**30
    earlier = [name for name in (path.name, PREVIOUS) if path.with_name(name).exists()]
    kept = f"{' and '.join(earlier)} from before is kept" if earlier else "there is no earlier one"
    return (
        f"cannot write the checkpoint of step {checkpoint.get('global_step')} to {path.parent} "
        f"({free:.2f} GiB free): {error}; {kept}. Free some space and run the same command again"
    )


class RunCheckpoint(Checkpoint):
    """Save last.ckpt at an interval of steps, at the end, and when the run is interrupted.

    A checkpoint is written before the following step, when the step and its validation are logged,
    so that a resumed run leaves no gap. The last one is written after the export.

    Ctrl-C and SIGTERM end the run after the current step: it is saved, and a line says how to
    resume. A second Ctrl-C ends the run at once. All ranks stop at the same step, whichever rank
    received the signal. A signal in a validation saves at once and stops when the validation ends.

    Args:
        folder: folder of last.ckpt.
        every_steps: steps between two saves.
    """

    def __init__(self, folder: str | Path, *, every_steps: int):
        super().__init__()
        if every_steps < 1:
            raise ValueError(f"every_steps is {every_steps}: it must be at least 1")
        self.path = Path(folder) / LAST
        self.every_steps = every_steps
        self._saved_step = 0
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: StageModule) -> None:
        """Replace Lightning's signal handlers, which save nothing."""
        self._saved_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        rank_zero_only(print)(
            "\nStopping after this step; press Ctrl-C again to stop at once.", flush=True
        )

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: StageModule, batch: Batch, batch_idx: int
    ) -> None:
        """Save the completed steps, at the interval or after a signal."""
        sync_logged_step(trainer)
        if is_within_step(trainer):
            return
        stop = self._is_told_to_stop(trainer)
        if stop or trainer.global_step % self.every_steps == 0:
            self._save(trainer)
        if stop:
            self._stop(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: StageModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save within a validation, unless it is the run's last or the stage is sharded."""
        last = trainer.global_step == trainer.max_steps
        if trainer.sanity_checking or last or is_sharded(pl_module.stage):
            return
        if self._is_told_to_stop(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: StageModule) -> None:
        """Save the last step."""
        self._save(trainer)
        self._restore_handlers()

    def on_exception(
        self, trainer: Trainer, pl_module: StageModule, exception: BaseException
    ) -> None:
        """Save after an error, unless weights are in doubt or other ranks would wait forever."""
        self._restore_handlers()
        if isinstance(exception, UNSAVED) or trainer.world_size > 1:
            return
        self._save(trainer)
        self._print_resume_command()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: StageModule, checkpoint: dict[str, Any]
    ) -> None:
        """Correct Lightning's counters."""
        rewind_to_step(checkpoint, trainer)

    def _is_told_to_stop(self, trainer: Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)

    def _save(self, trainer: Trainer) -> None:
        """Save, unless this step was saved already."""
        if trainer.global_step != self._saved_step:
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saved_step = trainer.global_step

    def _stop(self, trainer: Trainer) -> None:
        """End the run; the ranks that rank 0 started exit with 0, or it would be killed."""
        if trainer.is_global_zero:
            self._print_resume_command()
        number = self._signal or signal.SIGTERM
        raise SystemExit(128 + number if trainer.is_global_zero else 0)

    def _print_resume_command(self) -> None:
        if not self.path.exists():
            return
        words = [word for word in sys.argv if not word.startswith("resume=")]
        print(f"Resume with: {shlex.join(['python', *words, f'resume={self.path}'])}", flush=True)


class ValidateAtEnd(Callback):
    """Validate after the last step, so that the exported stage has its scores."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: StageModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Move the next validation to the last step."""
        if trainer.global_step == trainer.max_steps:
            validate_after_batch(trainer)


class RunMetadata(Callback):
    """Save a description of the run in its checkpoints, to compare with when it resumes.

    Args:
        metadata: plain values, the same on all ranks.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        self.text = json.dumps(metadata, sort_keys=True)

    def on_fit_start(self, trainer: Trainer, pl_module: StageModule) -> None:
        """Compare the ranks.

        Raises:
            ValueError: the ranks differ; all ranks raise it.
        """
        if trainer.world_size == 1:
            return
        texts: list[str | None] = [None] * trainer.world_size
        distributed.all_gather_object(texts, self.text)
        others = [rank for rank, text in enumerate(texts) if text != texts[0]]
        if others:
            raise ValueError(
                f"ranks {others} have another configuration or other data than rank 0: start all "
                "ranks with the same command"
            )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: StageModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the metadata as JSON, so that the file holds plain values."""
        checkpoint["run"] = self.text
