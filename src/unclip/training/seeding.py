"""Seeds for noise and timesteps: a function of what is drawn, never of what was drawn before."""

import hashlib
from collections.abc import Iterable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def seed_of(*parts: str | int) -> int:
    """A 63-bit seed from any words and numbers, the same on every machine."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def sample_generators(keys: Iterable[str], seed: int) -> list[torch.Generator]:
    """One CPU generator a sample, from its key: a picture does not depend on the batch it is in."""
    return [torch.Generator().manual_seed(seed_of(seed, key)) for key in keys]


class Seeding(Callback):
    """Reseeds torch before each batch from (seed, stage, batch index, rank).

    Ranks so draw different noise and timesteps, and a resumed run draws what an uninterrupted one
    would have drawn, with no generator state to save. Each validation draws the same noise.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict, batch_idx: int
    ) -> None:
        """Seeds from the batches of the whole run, which a checkpoint restores."""
        total = trainer.fit_loop.total_batch_idx
        torch.manual_seed(seed_of(self.seed, pl_module.name, total, trainer.global_rank))

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: dict,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Seeds from the batch's place alone: validation losses can be compared over time."""
        rank = trainer.global_rank
        torch.manual_seed(seed_of(self.seed, pl_module.name, "validation", batch_idx, rank))
