"""One progress bar a run: steps, loss, images a second, expected end."""

import sys
import time
from datetime import datetime, timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from unclip.training.callbacks.throughput import throughput_of


class StepProgress(ProgressBar):
    """A bar over all of a run's steps; where nobody sees a bar move, now and then a line.

    Args:
        every_seconds: between two refreshes of the bar.
        every_seconds_in_logs: between two lines, where stderr is not a terminal.
    """

    def __init__(self, *, every_seconds: float = 0.5, every_seconds_in_logs: float = 30.0):
        super().__init__()
        self._terminal = sys.stderr.isatty()
        self._every = every_seconds if self._terminal else every_seconds_in_logs
        self._bar: tqdm | None = None
        self._enabled = True
        self._next = 0.0

    def disable(self) -> None:
        """Says nothing, as on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Speaks again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the bar at the step that the run starts from; says so if it is not the first."""
        super().on_train_start(trainer, pl_module)
        self._next = time.monotonic() + self._every
        if self._enabled and trainer.global_step:
            print(f"{pl_module.name}: goes on after step {trainer.global_step}", file=sys.stderr)
        if self._enabled and self._terminal:
            self._bar = tqdm(
                desc=pl_module.name,
                initial=trainer.global_step,
                total=trainer.max_steps if trainer.max_steps > 0 else None,
                unit="step",
                dynamic_ncols=True,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refreshes now and then: reading the loss waits for the device."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        now, step = time.monotonic(), trainer.global_step
        if not self._enabled or (now < self._next and step != trainer.max_steps):
            return
        self._next = now + self._every
        shown = {"loss": f"{float(pl_module.last_loss):.4f}"}
        throughput = throughput_of(trainer)
        if throughput is not None:
            shown["images/s"] = f"{throughput.images_per_second:.1f}"
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix(shown)
        else:
            about = " · ".join(f"{name} {value}" for name, value in shown.items())
            end = self._expected_end(trainer, throughput)
            print(
                f"{pl_module.name}: step {step}/{trainer.max_steps} · {about}{end}", file=sys.stderr
            )

    @staticmethod
    def _expected_end(trainer: Trainer, throughput: Any) -> str:
        if throughput is None or trainer.max_steps < 0 or not trainer.global_step:
            return ""
        left = (trainer.max_steps - trainer.global_step) * throughput.seconds / trainer.global_step
        return f" · ends about {datetime.now() + timedelta(seconds=left):%H:%M:%S}"

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the bar."""
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Closes the bar, so that the message stands on a line of its own."""
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar."""
        tqdm.write(" ".join(str(arg) for arg in args), file=sys.stderr)
