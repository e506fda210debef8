"""Save images of a stage's output during training."""

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
from unclip.files import write_text
from unclip.images import to_pil, to_uint8
from unclip.training.callbacks.ema import averaged_weights
from unclip.training.modules import StageModule


class SampleGrid(Callback):
    """Save a grid before the first step and at each validation: same samples, same noise.

    The samples are the first of the first validation batch. A stage without a preview is skipped.

    Args:
        folder: folder of the grids STEP.png and of their captions.
        count: number of samples in a grid.
    """

    def __init__(self, folder: str | Path, *, count: int = 8):
        self.folder = Path(folder)
        self.count = count
        self._batch: Batch | None = None

    @rank_zero_only
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: StageModule, batch: dict[str, Any], *_: Any
    ) -> None:
        """Keep the first samples of the first batch."""
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
        self.folder.mkdir(parents=True, exist_ok=True)
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
