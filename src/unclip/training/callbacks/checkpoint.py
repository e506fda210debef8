"""Checkpoints to continue from, on time and when a run is told to stop."""

import shlex
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from unclip.training.callbacks.guard import NonFiniteError
from unclip.training.loop_state import at_whole_step
from unclip.training.resuming import LAST, CheckpointError
from unclip.training.sharding import is_sharded

# After these, weights are in doubt, or saving would fail again, or is not wanted.
UNSAVED = (SystemExit, KeyboardInterrupt, NonFiniteError, CheckpointError)


class RunCheckpoint(Checkpoint):
    """Keeps last.ckpt: every so many steps, at the end, and when the run is interrupted.

    A checkpoint is written before the step after its own, when the log has the step's line and its
    validation: a run that goes on from it leaves no gap. The last is written when the stage is
    exported.

    Ctrl-C and SIGTERM end the run after the step at hand, saved, and it says how to continue; a
    second Ctrl-C ends it at once. All ranks stop at the same step, whichever of them got the
    signal. A signal during validation saves at once and stops when that is done.

    Args:
        folder: where last.ckpt goes.
        every_steps: between two saves.
    """

    def __init__(self, folder: str | Path, *, every_steps: int):
        super().__init__()
        if every_steps < 1:
            raise ValueError(f"every_steps is {every_steps}; it must be at least 1")
        self.path = Path(folder) / LAST
        self.every_steps = every_steps
        self._saved_step = 0
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals, in place of Lightning's handler, which saves nothing."""
        self._saved_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        rank_zero_only(print)(
            "\nStopping after this step; Ctrl-C once more stops at once.", flush=True
        )

    def _release_signals(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves what the steps so far have made, where a multiple or a signal says so."""
        loop = trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = trainer.global_step  # the loggers' step, also when resumed
        if loop.batch_progress.current.processed % trainer.accumulate_grad_batches:
            return  # amid a step
        stop = self._told_to_stop(trainer)
        if stop or trainer.global_step % self.every_steps == 0:
            self._save(trainer)
        if stop:
            self._stop(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Does not wait for the end of a validation, unless the run then ends or is sharded."""
        last = trainer.global_step == trainer.max_steps
        if trainer.sanity_checking or last or is_sharded(pl_module.stage):
            return
        if self._told_to_stop(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last step."""
        self._save(trainer)
        self._release_signals()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Saves after an error, unless weights are in doubt or other ranks would wait for ever."""
        self._release_signals()
        if isinstance(exception, UNSAVED) or trainer.world_size > 1:
            return
        self._save(trainer)
        self._say_how_to_continue()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Puts Lightning's counters right."""
        at_whole_step(
            checkpoint["loops"]["fit_loop"],
            steps=trainer.global_step,
            epoch_batches=trainer.num_training_batches,
            accumulated=trainer.accumulate_grad_batches,
        )

    def _told_to_stop(self, trainer: Trainer) -> bool:
        told = self._signal is not None
        return trainer.strategy.reduce_boolean_decision(told, all=False)

    def _save(self, trainer: Trainer) -> None:
        """Saves, unless this step is saved already."""
        if trainer.global_step != self._saved_step:
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saved_step = trainer.global_step

    def _stop(self, trainer: Trainer) -> None:
        """Ends the run; rank 0 alone with a code, lest a launcher kill it for a child."""
        if trainer.is_global_zero:
            self._say_how_to_continue()
        number = self._signal or signal.SIGTERM
        raise SystemExit(128 + number if trainer.is_global_zero else 0)

    def _say_how_to_continue(self) -> None:
        if not self.path.exists():
            return
        words = [word for word in sys.argv if not word.startswith("resume=")]
        print(f"Continue with: {shlex.join(['python', *words, f'resume={self.path}'])}", flush=True)
