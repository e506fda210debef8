"""Stop a run before a non-finite loss reaches its weights."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from unclip.batch import Batch
from unclip.files import write_text
from unclip.training.modules import StageModule


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; weights, averages and checkpoints are still good."""


class NonFiniteGuard(Callback):
    """Check loss and gradient norm before each step; on failure save the sample keys.

    Gradients are summed over ranks, so that all ranks stop at the same step.

    Args:
        folder: folder of the file nonfinite_STEP_RANK.json with the keys.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._keys: list[str] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: StageModule, batch: Batch, batch_idx: int
    ) -> None:
        """Remember the samples of the coming gradient."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._keys = []
        self._keys += batch["key"]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: StageModule, *_: Any) -> None:
        """Raise NonFiniteError instead of taking the step."""
        loss, norm = pl_module.last_loss, pl_module.gradient_norm()
        finite = bool(torch.isfinite(loss + norm))
        if trainer.strategy.reduce_boolean_decision(finite, all=True):
            return
        step, rank = trainer.global_step, trainer.global_rank
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"nonfinite_{step}_{rank}.json"
        values = {"loss": str(loss.item()), "gradient_norm": str(norm.item())}
        about = {"step": step, "rank": rank, **values, "keys": self._keys}
        write_text(path, json.dumps(about, indent=1))
        raise NonFiniteError(
            f"step {step}: the loss is {loss.item()} and the gradient norm {norm.item()}. The step "
            f"was not taken; its samples are listed in {path}. Lower optimizer.lr, or inspect the "
            "samples, and resume from the last checkpoint"
        )
