"""Stops a run before a loss that is not finite reaches its weights."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; weights, averages and checkpoints are still good."""


class NonFiniteGuard(Callback):
    """Looks at loss and gradient norm before each optimizer step, and writes down the batch's keys.

    Gradients are summed over ranks, so that all ranks stop at the same step.

    Args:
        folder: where the keys go, as nonfinite_STEP_RANK.json.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._keys: list[str] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Remembers which samples the coming gradient is of."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._keys = []
        self._keys += batch["key"]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Raises NonFiniteError instead of letting the step happen."""
        loss, norm = pl_module.last_loss, pl_module.gradient_norm()
        finite = bool(torch.isfinite(loss + norm))
        if trainer.strategy.reduce_boolean_decision(finite, all=True):
            return
        step, rank = trainer.global_step, trainer.global_rank
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"nonfinite_{step}_{rank}.json"
        about = {
            "step": step,
            "rank": rank,
            "loss": str(loss.item()),
            "gradient_norm": str(norm.item()),
        }
        path.write_text(json.dumps({**about, "keys": self._keys}, indent=1))
        raise NonFiniteError(
            f"step {step}: the loss is {loss.item()} and the gradient norm {norm.item()}. Nothing "
            f"was changed by this step; its samples are in {path}. Lower optimizer.lr, or look at "
            "these samples, and resume from the last checkpoint"
        )
