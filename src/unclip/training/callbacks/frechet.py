"""The Fréchet distance of a decoder's samples, measured while it trains."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from unclip.evaluation.distributed import gather_rows
from unclip.evaluation.features import EfficientNetLite0
from unclip.evaluation.frechet import fit_gaussian, frechet_distance
from unclip.images import to_uint8


class FrechetDistance(Callback):
    """Logs validation/fd_effnet_lite0 between the first validation pictures and samples for them.

    It is biased by the number of pictures, of all ranks together: compare it within a run.
    """

    def __init__(self):
        self._features: EfficientNetLite0 | None = None
        self._rows: dict[str, list[Tensor]] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loads the features when they are first needed."""
        if self._features is None:
            self._features = EfficientNetLite0()
        self._features.to(pl_module.device)
        self._rows = {"real": [], "decoded": []}

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draws a sample for each picture of the batch."""
        shown = pl_module.preview(batch)
        for name, features in self._rows.items():
            features.append(self._features(to_uint8(shown[name])).cpu())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the two sets."""
        real, decoded = (fit_gaussian(gather_rows(torch.cat(rows))) for rows in self._rows.values())
        distance = frechet_distance(real, decoded)
        pl_module.log("validation/fd_effnet_lite0", distance, sync_dist=True)
