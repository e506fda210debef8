"""Save the output of a run: images of the stage during training, and the trained stage."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import make_grid

from unclip.batch import Batch
from unclip.bundle import save_stage
from unclip.files import write_text
from unclip.images import to_pil, to_uint8
from unclip.model_card import write_model_card
from unclip.provenance import run_record
from unclip.training.callbacks.ema import averaged_weights
from unclip.training.callbacks.progress import Throughput
from unclip.training.lightning_compat import find_callback
from unclip.training.modules import StageModule
from unclip.training.sharding import full_state_dict, unsharded


class SampleGrid(Callback):
    """Save a grid before the first step and at each validation: same samples, same noise.

    The samples are the first `count` of the first validation batch. The files are FOLDER/STEP.png
    and captions.txt. A stage without a preview is skipped.
    """

    def __init__(self, folder: str | Path, *, count: int = 8):
        self.folder = Path(folder)
        self.count = count
        self._batch: Batch | None = None

    @rank_zero_only
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: StageModule, batch: dict[str, Any], *_: Any
    ) -> None:
        if self._batch is None:
            first = {name: value[: self.count] for name, value in batch.items()}
            self._batch = cast(Batch, first)

    @rank_zero_only
    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: StageModule) -> None:
        """Sample with the averaged weights, and save the grid."""
        if self._batch is None:
            return
        training = pl_module.stage.training
        with averaged_weights(trainer), trainer.precision_plugin.forward_context():
            pl_module.stage.eval()
            rows = pl_module.preview(self._batch)
            pl_module.stage.train(training)
        if not rows:
            return
        names = ", ".join(rows)
        lines = [f"rows: {names}", *self._batch["caption"]]
        write_text(self.folder / "captions.txt", "\n".join(lines) + "\n")
        grid = to_pil(to_uint8(grid_of(rows)[None])[0])
        grid.save(self.folder / f"{trainer.global_step:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [grid], step=trainer.global_step, caption=[names])


def grid_of(rows: dict[str, Tensor]) -> Tensor:
    """Arrange rows of images `B 3 H W` in [-1, 1] as one image; smaller images are enlarged."""
    height = max(row.shape[2] for row in rows.values())
    images = [interpolate(row.float().cpu(), size=(height, height)) for row in rows.values()]
    columns = len(images[0])
    return make_grid(torch.cat(images).clamp(-1, 1), nrow=columns, padding=2, pad_value=1.0)


class Export(Callback):
    """Write the averaged weights to models/NAME/STAGE.safetensors when training ends.

    The file and the bundle's card also contain `about`, such as the data's license. The validation
    metric `metric` is printed.
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
        metrics = trainer.callback_metrics.items()
        scores = {k: round(float(v), 6) for k, v in metrics if k.startswith("validation/")}
        cost = {"seconds": round(self.state_dict()["seconds"], 1)}
        minutes, seconds = divmod(round(cost["seconds"]), 60)
        parts = [pl_module.name, f"{trainer.global_step} steps", f"{minutes}:{seconds:02d} min"]
        if (throughput := find_callback(trainer, Throughput)) is not None:
            cost["images"] = throughput.images
            parts.append(f"{throughput.images / max(throughput.seconds, 1e-9):.1f} images/s")
        if self.metric in scores:
            parts.append(f"{self.metric} {scores[self.metric]:.4g}")
        for left in self.path.parent.glob(f".{self.path.name}.*.tmp"):  # by a killed run
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
