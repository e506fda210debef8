"""Checkpoints to resume from: when they are written, how, and of which run they say they are."""

import json
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed

from unclip.files import atomic_write
from unclip.training import lightning_compat
from unclip.training.callbacks.guard import NonFiniteError
from unclip.training.modules import StageModule
from unclip.training.resume import LAST, PREVIOUS, CheckpointError, load_checkpoint
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
                    try:
                        os.link(path, previous)
                    except OSError:  # a file system without links
                        os.replace(path, previous)
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # makes the rename durable
            os.close(folder)
        except (OSError, RuntimeError) as error:  # torch turns an OSError into a RuntimeError
            raise CheckpointError(_write_failure(path, checkpoint, error)) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Open a checkpoint; its tensors are read from the file when they are used.

        All ranks open that of rank 0, which alone has verified it.

        Raises:
            FileNotFoundError: there is no such file; a run that should resume never starts over.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no checkpoint {path}")
        chosen = [path]
        if distributed.is_initialized():
            distributed.broadcast_object_list(chosen, src=0)
        return load_checkpoint(Path(chosen[0]))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint, if it exists."""
        Path(path).unlink(missing_ok=True)


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

    Ctrl-C, SIGTERM and a closed terminal (SIGHUP, unless nohup ignores it) end the run after the
    current step, on several GPUs after the next logged step: it is saved, and a line says how to
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

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Replace Lightning's signal handlers, which save nothing."""
        self._saved_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        message = "\nStopping after this step; press Ctrl-C again to stop at once."
        with suppress(OSError):  # the terminal may be closed
            rank_zero_only(print)(message, flush=True)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Save the completed steps, at the interval or after a signal."""
        lightning_compat.sync_logged_step(trainer)
        if lightning_compat.is_within_step(trainer):
            return
        step = trainer.global_step
        asks = trainer.world_size == 1 or lightning_compat.may_wait(trainer, step)
        stop = asks and self._should_stop(trainer)
        if stop or step % self.every_steps == 0:
            self._save(trainer)
        if stop:  # the ranks that rank 0 started exit with 0, or it would be killed
            self._print_resume_command()
            number = self._signal or signal.SIGTERM
            raise SystemExit(128 + number if trainer.is_global_zero else 0)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: StageModule, *_: Any) -> None:
        """Save within a validation, unless it is the run's last or the stage is sharded."""
        last = trainer.global_step == trainer.max_steps
        if trainer.sanity_checking or last or is_sharded(pl_module.stage):
            return
        if self._should_stop(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Save the last step."""
        self._save(trainer)
        self._restore_handlers()

    def on_exception(
        self, trainer: Trainer, pl_module: StageModule, exception: BaseException
    ) -> None:
        """Save after an error, unless weights are in doubt or other ranks would wait forever."""
        self._restore_handlers()
        if isinstance(exception, UNSAVED):
            return
        if trainer.world_size == 1:
            self._save(trainer)
        else:
            name, rank = type(exception).__name__, trainer.global_rank
            print(
                f"rank {rank} ends with {name}: the cause is the first error in the output, or a "
                "rank died or did not answer",
                flush=True,
            )
        self._print_resume_command()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: StageModule, checkpoint: dict[str, Any]
    ) -> None:
        """Correct Lightning's counters."""
        lightning_compat.rewind_to_step(checkpoint, trainer)

    def _should_stop(self, trainer: Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)

    def _save(self, trainer: Trainer) -> None:
        """Save, unless this step was saved already."""
        if trainer.global_step != self._saved_step:
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saved_step = trainer.global_step

    @rank_zero_only
    def _print_resume_command(self) -> None:
        if self.path.exists():
            words = [word for word in sys.argv if not word.startswith("resume=")]
            command = shlex.join(["python", *words, f"resume={self.path}"])
            print(f"Resume with: {command}", flush=True)


class ValidateAtEnd(Callback):
    """Validate after the last step, so that the exported stage has its scores."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Move the next validation to the last step."""
        if trainer.global_step == trainer.max_steps:
            lightning_compat.validate_after_batch(trainer)


class RunMetadata(Callback):
    """Save a description of the run in its checkpoints, to compare with when it resumes.

    Args:
        metadata: plain values, the same on all ranks.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        self.text = json.dumps(metadata, sort_keys=True)

    def on_fit_start(self, trainer: Trainer, *_: Any) -> None:
        """Compare the ranks; all raise ValueError if one of them differs."""
        texts = [self.text] * trainer.world_size
        if trainer.world_size > 1:
            distributed.all_gather_object(texts, self.text)
        if others := [rank for rank, text in enumerate(texts) if text != texts[0]]:
            raise ValueError(
                f"ranks {others} have another configuration or other data than rank 0: start all "
                "ranks with the same command"
            )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: StageModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the metadata as JSON, so that the file holds plain values."""
        checkpoint["run"] = self.text
