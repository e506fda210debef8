"""Seed noise and timesteps by batch, not by what was sampled before."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from unclip.training.lightning_compat import batches_started
from unclip.training.modules import StageModule, seed_of


class Seeding(Callback):
    """Reseed torch before each batch from (seed, stage, batch index, rank).

    Ranks sample different noise and timesteps, and a resumed run samples the same as an
    uninterrupted one without a saved generator state. Every validation samples the same noise.

    Args:
        seed: seed of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: StageModule, *_: Any) -> None:
        """Seed from the number of batches since the run began, which a checkpoint restores."""
        total = batches_started(trainer)
        torch.manual_seed(seed_of(self.seed, pl_module.name, total, trainer.global_rank))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: StageModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Seed from the index in the validation, so that losses are comparable over time."""
        rank = trainer.global_rank
        torch.manual_seed(seed_of(self.seed, pl_module.name, "validation", batch_idx, rank))
