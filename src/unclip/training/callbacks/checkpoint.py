"""Save a run at intervals and when it is interrupted, and stop it before a NaN is saved."""

import json
import shlex
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from unclip.batch import Batch
from unclip.files import write_text
from unclip.training import lightning_compat
from unclip.training.modules import StageModule, gather_objects
from unclip.training.resume import LAST, CheckpointError
from unclip.training.sharding import is_sharded


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; averages and checkpoints on the disk are still good."""


# After these exceptions the weights are in doubt, saving would fail again, or it is not wanted.
UNSAVED = (SystemExit, KeyboardInterrupt, NonFiniteError, CheckpointError)


class RunCheckpoint(Checkpoint):
    """Save FOLDER/last.ckpt at an interval of steps, at the end, and when the run is interrupted.

    A checkpoint is written before the following step, when the step and its validation are logged,
    so that a resumed run leaves no gap. The last one is written after the export.

    Ctrl-C, SIGTERM and a closed terminal (SIGHUP, unless nohup ignores it) end the run after the
    current step, on several GPUs after the next logged step: it is saved, and a line says how to
    resume. A second Ctrl-C ends the run at once. All ranks stop at the same step, whichever rank
    received the signal. A signal in a validation saves at once and stops when the validation ends.
    """

    def __init__(self, folder: str | Path, *, every_steps: int):
        super().__init__()
        self.path = Path(folder) / LAST
        self.every_steps = every_steps
        self._saved_step = 0
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        """Replace Lightning's signal handlers, which save nothing."""
        self._saved_step = trainer.global_step
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
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
            print(
                f"rank {trainer.global_rank} ends with {type(exception).__name__}: the cause is "
                "the first error in the output, or a rank died or did not answer",
                flush=True,
            )
        self._print_resume_command()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: StageModule, checkpoint: dict[str, Any]
    ) -> None:
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


class RunMetadata(Callback):
    """Save plain values that describe the run in its checkpoints, to compare when it resumes."""

    def __init__(self, metadata: Mapping[str, Any]):
        self.text = json.dumps(metadata, sort_keys=True)

    def on_fit_start(self, trainer: Trainer, *_: Any) -> None:
        """Compare the ranks; all raise ValueError if one of them differs."""
        texts = gather_objects(self.text, trainer.world_size)
        if others := [rank for rank, text in enumerate(texts) if text != texts[0]]:
            raise ValueError(
                f"ranks {others} have another configuration or other data than rank 0: start all "
                "ranks with the same command"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: StageModule, checkpoint: Any) -> None:
        checkpoint["run"] = self.text


class Step(NamedTuple):
    """A step that has not been checked yet."""

    number: int
    keys: list[str]
    loss: Tensor
    norm: Tensor
    finite: Tensor


class NonFiniteGuard(Callback):
    """Check loss and gradient norm of each step; save the keys to FOLDER/nonfinite_STEP_RANK.json.

    On a CPU each step is checked before it is taken. A GPU would be idle while it waits for the
    check, so there all steps since the last check are checked at each logged step, and before the
    weights are validated or saved. Gradients are summed over ranks, so all ranks stop together.

    With float16, gradients that overflow are no failure as long as their scale can be reduced: the
    scaler skips such a step.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._keys: list[str] = []
        self._unchecked: list[Step] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: StageModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._keys = []
        self._keys += batch["key"]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: StageModule, *_: Any) -> None:
        """Note the step, and check it if reading from the device is cheap."""
        loss, norm = pl_module.last_loss, pl_module.gradient_norm()
        finite = torch.isfinite(loss + norm)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() > 1:
            finite = torch.isfinite(loss)
        self._unchecked.append(Step(trainer.global_step, self._keys, loss, norm, finite))
        if lightning_compat.may_wait(trainer, trainer.global_step + 1):
            self._check(trainer)

    def _check(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Raise NonFiniteError if a step was not finite on any rank."""
        steps, self._unchecked = self._unchecked, []
        if not steps:
            return
        finite = torch.stack([step.finite for step in steps]).tolist()
        if trainer.strategy.reduce_boolean_decision(all(finite), all=True):
            return
        bad = steps[finite.index(False) if False in finite else -1]
        rank, loss, norm = trainer.global_rank, bad.loss.item(), bad.norm.item()
        path = self.folder / f"nonfinite_{bad.number}_{rank}.json"
        values = {"loss": str(loss), "gradient_norm": str(norm)}
        about = {"step": bad.number, "rank": rank, **values, "keys": bad.keys}
        write_text(path, json.dumps(about, indent=1))
        raise NonFiniteError(
            f"step {bad.number}: the loss is {loss} and the gradient norm {norm}. Nothing has been "
            f"saved since; its samples are listed in {path}. Lower optimizer.lr, or inspect the "
            "samples, and resume from the last checkpoint"
        )

    # before the weights are validated, exported or saved
    on_validation_start = on_train_end = on_save_checkpoint = _check
