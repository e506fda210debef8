"""Hands a trained stage over to its bundle."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from unclip.bundle import save_stage
from unclip.training.callbacks.throughput import throughput_of
from unclip.training.ema import averaged_weights
from unclip.training.sharding import gathered, whole_state


class Export(Callback):
    """At the end of training writes the averaged weights into the bundle and says so in one line.

    Args:
        path: models/NAME/STAGE.safetensors.
        metric: the validation metric that the line names.
    """

    def __init__(self, path: str | Path, *, metric: str):
        self.path = Path(path)
        self.metric = metric
        self._seconds_before = 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the run has taken, validation and earlier parts of a resumed run included."""
        return self._seconds_before + time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        """The time that a resumed run adds to its own."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Adds the time until the checkpoint."""
        self._seconds_before = state_dict["seconds"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._started = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the file on rank 0. A run that an exception ends does not come here."""
        stage = pl_module.stage
        with averaged_weights(trainer):
            with gathered(stage):
                if trainer.is_global_zero:
                    stage.fit_variance(pl_module.training_batches())
            weights = whole_state(stage)
            if trainer.is_global_zero:
                self._write(trainer, pl_module, weights)

    def _write(
        self, trainer: Trainer, pl_module: LightningModule, weights: dict[str, Tensor]
    ) -> None:
        scores = {
            name: round(float(value), 6)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("validation/")
        }
        throughput = throughput_of(trainer)
        effort = {"seconds": round(self.seconds, 1)}
        if throughput is not None:
            effort["images"] = throughput.images
        embedder = pl_module.embedder
        save_stage(
            self.path,
            pl_module.stage,
            recipe=pl_module.recipe,
            steps=trainer.global_step,
            clip_fingerprint=None if embedder is None else embedder.fingerprint,
            extra={**effort, **scores},
            state_dict=weights,
        )
        minutes, seconds = divmod(round(effort["seconds"]), 60)
        parts = [pl_module.name, f"{trainer.global_step} steps", f"{minutes}:{seconds:02d} min"]
        if throughput is not None:
            parts.append(f"{throughput.images / max(throughput.seconds, 1e-9):.1f} images/s")
        if self.metric in scores:
            parts.append(f"{self.metric} {scores[self.metric]:.4g}")
        print(" · ".join([*parts, str(self.path)]), flush=True)
