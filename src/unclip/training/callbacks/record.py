"""What run a checkpoint is of."""

import json
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed


class RunRecord(Callback):
    """Writes into checkpoints what the run is made of, for a run that wants to go on from them.

    Args:
        record: plain values, the same on all ranks.
    """

    def __init__(self, record: Mapping[str, Any]):
        self.text = json.dumps(record, sort_keys=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the ranks.

        Raises:
            ValueError: on all ranks, when they were not started alike.
        """
        if trainer.world_size == 1:
            return
        texts: list[str | None] = [None] * trainer.world_size
        distributed.all_gather_object(texts, self.text)
        others = [rank for rank, text in enumerate(texts) if text != texts[0]]
        if others:
            raise ValueError(
                f"ranks {others} were started with another configuration or other data than rank 0"
            )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """As text, so that the file stays plain."""
        checkpoint["run"] = self.text
