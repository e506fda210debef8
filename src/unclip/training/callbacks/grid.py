"""Pictures of what a stage does, made while it trains."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image
from torch import Tensor

from unclip.images import to_pil, to_uint8
from unclip.training.ema import averaged_weights


def contact_sheet(rows: dict[str, Tensor]) -> Image.Image:
    """Rows of pictures `B 3 H W` in [-1, 1], one under another, two pixels of white between."""
    height = max(row.shape[2] for row in rows.values())
    strips = []
    for row in rows.values():
        row = row.detach().float().cpu().clamp(-1, 1)
        if row.shape[2] != height:
            row = torch.nn.functional.interpolate(row, size=(height, height), mode="nearest")
        row = torch.nn.functional.pad(row, (1, 1, 1, 1), value=1.0)
        strips.append(torch.cat(list(row), dim=2))  # (3, H + 2, B (W + 2))
    sheet = torch.cat(strips, dim=1)
    return to_pil(to_uint8(sheet[None])[0])


class SampleGrid(Callback):
    """Writes a sheet before the first step and at each validation: same samples, same noise.

    The samples are the first of the first validation batch. Stages that make no pictures are left
    alone.

    Args:
        folder: where the sheets go, as STEP.png, their captions beside them.
        count: samples of a sheet.
    """

    def __init__(self, folder: str | Path, *, count: int = 8):
        self.folder = Path(folder)
        self.count = count
        self._batch: dict[str, Any] | None = None

    @rank_zero_only
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the first samples that come by."""
        if self._batch is None:
            self._batch = {name: value[: self.count] for name, value in batch.items()}

    @rank_zero_only
    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws and writes a sheet with the averaged weights."""
        if self._batch is None:
            return
        training = pl_module.stage.training
        with averaged_weights(trainer):
            pl_module.stage.eval()
            rows = pl_module.preview(self._batch)
            pl_module.stage.train(training)
        if not rows:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        captions = self.folder / "captions.txt"
        if not captions.exists():
            names = ", ".join(rows)
            captions.write_text("\n".join([f"rows: {names}", *self._batch["caption"]]) + "\n")
        step = trainer.global_step
        sheet = contact_sheet(rows)
        sheet.save(self.folder / f"{step:07d}.png")
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("samples", [sheet], step=step, caption=[", ".join(rows)])
