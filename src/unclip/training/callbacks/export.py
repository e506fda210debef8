"""Export a trained stage into its bundle."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from unclip.bundle import save_stage
from unclip.model_card import write_model_card
from unclip.provenance import run_record
from unclip.training.callbacks.ema import averaged_weights
from unclip.training.callbacks.progress import Throughput
from unclip.training.lightning_compat import find_callback
from unclip.training.modules import StageModule
from unclip.training.sharding import full_state_dict, unsharded


class Export(Callback):
    """Write the averaged weights into the bundle, and its card, when training ends.

    Args:
        path: file models/NAME/STAGE.safetensors.
        metric: validation metric to print.
        about: values to store in the file and to show in the card, such as the data's license.
    """

    def __init__(self, path: str | Path, *, metric: str, about: Mapping[str, Any] | None = None):
        self.path = Path(path)
        self.metric = metric
        self.about = {key: value for key, value in (about or {}).items() if value is not None}
        self._seconds_before = 0.0
        self._started = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return the run's duration, with validation and with the parts before a resume."""
        return {"seconds": self._seconds_before + time.monotonic() - self._started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Add the duration until the checkpoint."""
        self._seconds_before = state_dict["seconds"]

    def on_fit_start(self, *_: Any) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: StageModule) -> None:
        """Write the file on rank 0; a run that ends with an exception does not get here."""
        stage = pl_module.stage
        with averaged_weights(trainer):
            with unsharded(stage):
                if trainer.is_global_zero:
                    stage.fit_variance(pl_module.training_batches())
            weights = full_state_dict(stage, keep=trainer.is_global_zero)
            if trainer.is_global_zero:
                self._write(trainer, pl_module, weights)

    def _write(self, trainer: Trainer, pl_module: StageModule, weights: dict[str, Tensor]) -> None:
        scores = {
            name: round(float(value), 6)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("validation/")
        }
        cost = {"seconds": round(self.state_dict()["seconds"], 1)}
        minutes, seconds = divmod(round(cost["seconds"]), 60)
        parts = [pl_module.name, f"{trainer.global_step} steps", f"{minutes}:{seconds:02d} min"]
        if (throughput := find_callback(trainer, Throughput)) is not None:
            cost["images"] = throughput.images
            parts.append(f"{throughput.images / max(throughput.seconds, 1e-9):.1f} images/s")
        if self.metric in scores:
            parts.append(f"{self.metric} {scores[self.metric]:.4g}")
        for left in self.path.parent.glob(f".{self.path.name}.*.tmp"):  # a killed run's
            left.unlink(missing_ok=True)
        save_stage(
            self.path,
            pl_module.stage,
            recipe=pl_module.recipe,
            steps=trainer.global_step,
            clip_fingerprint=pl_module.clip_fingerprint,
            extra={**cost, **scores, **self.about, **run_record()},
            state_dict=weights,
        )
        try:
            write_model_card(self.path.parent)
        except (KeyError, OSError, ValueError) as error:  # the stage itself is saved
            print(f"{self.path.parent}: the model card was not written: {error}", flush=True)
        print(" · ".join([*parts, str(self.path)]), flush=True)
