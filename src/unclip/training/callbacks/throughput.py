"""How fast a run trains."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Counts images and seconds of training, validation left out, over all ranks and resumptions.

    Attributes:
        images: trained on so far.
        seconds: spent on training so far.
        images_per_second: of late, as an average over some `window` seconds.

    Args:
        window: in seconds.
    """

    def __init__(self, window: float = 20.0):
        self.window = window
        self.images = 0
        self.seconds = 0.0
        self.images_per_second = 0.0
        self._since: float | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Starts the clock where it stands still: at the first batch and after a validation."""
        if self._since is None:
            self._since = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
    ) -> None:
        """Counts the batch, and logs the rate when the trainer logs."""
        now = time.perf_counter()
        seconds, images = now - self._since, len(batch["key"]) * trainer.world_size
        self._since = now
        self.seconds += seconds
        self.images += images
        fresh = min(seconds / min(self.window, self.seconds), 1.0)
        self.images_per_second += fresh * (images / seconds - self.images_per_second)
        if trainer.global_step % trainer.log_every_n_steps == 0:
            rate, images = self.images_per_second, float(self.images)
            pl_module.log_dict({"train/images_per_second": rate, "train/images": images})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._since = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run continues counting from."""
        return {"images": self.images, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues counting."""
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]


def throughput_of(trainer: Trainer) -> Throughput | None:
    """The trainer's Throughput, if it has one."""
    return next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)
