"""Progress bar, throughput and memory use of a run."""

import resource
import sys
import time
from datetime import datetime, timedelta
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from unclip.batch import Batch
from unclip.training.modules import StageModule

WINDOW_SECONDS = 20.0  # of the moving average of images per second


class Throughput(Callback):
    """Count images and seconds of training without validation, over all ranks and resumed runs.

    Attributes:
        images: number of images trained on.
        seconds: seconds of training.
        images_per_second: exponential moving average over about 20 seconds.
    """

    def __init__(self):
        self.images = 0
        self.seconds = 0.0
        self.images_per_second = 0.0
        self._since: float | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: StageModule, batch: Batch, batch_idx: int
    ) -> None:
        """Start the clock at the first batch and after a validation."""
        if self._since is None:
            self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: StageModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the batch, and log the rate when the trainer logs."""
        now = time.perf_counter()
        seconds, images = now - self._since, len(batch["key"]) * trainer.world_size
        self._since = now
        self.seconds += seconds
        self.images += images
        weight = min(seconds / min(WINDOW_SECONDS, self.seconds), 1.0)
        self.images_per_second += weight * (images / seconds - self.images_per_second)
        if trainer.global_step % trainer.log_every_n_steps == 0:
            rate, images = self.images_per_second, float(self.images)
            pl_module.log_dict({"train/images_per_second": rate, "train/images": images})

    def on_validation_start(self, trainer: Trainer, pl_module: StageModule) -> None:
        """Stop the clock."""
        self._since = None

    def state_dict(self) -> dict[str, Any]:
        """Return the counts that a resumed run continues."""
        return {"images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]


def throughput_of(trainer: Trainer) -> Throughput | None:
    """Return the trainer's Throughput, if it has one."""
    return next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)


class MemoryUse(Callback):
    """Log train/memory_gib, the peak memory of the GPU or, on a CPU, of the process."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: StageModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log the peak when the trainer logs."""
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log("train/memory_gib", peak_memory(pl_module.device) / 2**30)


def peak_memory(device: torch.device) -> float:
    """Return the peak memory use so far, in bytes."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


class StepProgress(ProgressBar):
    """Progress bar over all steps; prints a line every 30 s when stderr is not a terminal.

    Args:
        every_seconds: seconds between two updates; None for 0.5 on a terminal and 30 otherwise.
    """

    def __init__(self, *, every_seconds: float | None = None):
        super().__init__()
        self._terminal = sys.stderr.isatty()
        default = 0.5 if self._terminal else 30.0
        self._every = default if every_seconds is None else every_seconds
        self._bar: tqdm | None = None
        self._enabled = True
        self._next = 0.0

    def disable(self) -> None:
        """Disable output (ranks other than 0)."""
        self._enabled = False

    def enable(self) -> None:
        """Enable output again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: StageModule) -> None:
        """Open the bar at the first step, or at the step that the run resumes from."""
        super().on_train_start(trainer, pl_module)
        self._next = time.monotonic() + self._every
        if self._enabled and trainer.global_step:
            print(f"{pl_module.name}: resumed after step {trainer.global_step}", file=sys.stderr)
        if self._enabled and self._terminal:
            self._bar = tqdm(
                desc=pl_module.name,
                initial=trainer.global_step,
                total=trainer.max_steps if trainer.max_steps > 0 else None,
                unit="step",
                dynamic_ncols=True,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: StageModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Update at an interval: reading the loss waits for the device."""
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
            return
        parts = [f"{pl_module.name}: step {step}/{trainer.max_steps}"]
        parts += [f"{name} {value}" for name, value in shown.items()]
        if throughput is not None and step and trainer.max_steps > 0:
            left = timedelta(seconds=(trainer.max_steps - step) * throughput.seconds / step)
            parts.append(f"ends at about {datetime.now() + left:%H:%M:%S}")
        print(" · ".join(parts), file=sys.stderr)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_train_end(self, trainer: Trainer, pl_module: StageModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: StageModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the error message starts on its own line."""
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        tqdm.write(" ".join(str(arg) for arg in args), file=sys.stderr)
