"""Stop a run before a non-finite loss reaches its files."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from unclip.batch import Batch
from unclip.files import write_text
from unclip.training.lightning_compat import may_wait
from unclip.training.modules import StageModule


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; averages and checkpoints on the disk are still good."""


class Step(NamedTuple):
    """A step that has not been checked yet."""

    number: int
    keys: list[str]
    loss: Tensor
    norm: Tensor
    finite: Tensor


class NonFiniteGuard(Callback):
    """Check loss and gradient norm of each step; on failure save the sample keys.

    On a CPU each step is checked before it is taken. A GPU would be idle while it waits for the
    check, so there all steps since the last check are checked at each logged step, and before the
    weights are validated or saved. Gradients are summed over ranks, so all ranks stop together.

    With float16, gradients that overflow are no failure as long as their scale can be reduced: the
    scaler skips such a step.

    Args:
        folder: folder of the file nonfinite_STEP_RANK.json with the keys.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._keys: list[str] = []
        self._unchecked: list[Step] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: StageModule, batch: Batch, batch_idx: int
    ) -> None:
        """Remember the samples of the coming gradient."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._keys = []
        self._keys += batch["key"]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: StageModule, *_: Any) -> None:
        """Note the step, and check it if reading from the device is cheap."""
        loss, norm = pl_module.last_loss, pl_module.gradient_norm()
        finite = torch.isfinite(loss + norm)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() > 1:
            finite = torch.isfinite(loss)
        self._unchecked.append(Step(trainer.global_step, self._keys, loss, norm, finite))
        if may_wait(trainer, trainer.global_step + 1):
            self._check(trainer)

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        """Check before the weights are validated."""
        self._check(trainer)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Check before the weights are exported."""
        self._check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        """Check before the weights are saved."""
        self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        """Raise NonFiniteError if a step was not finite on any rank."""
        steps, self._unchecked = self._unchecked, []
        if not steps:
            return
        finite = torch.stack([step.finite for step in steps]).tolist()
        if trainer.strategy.reduce_boolean_decision(all(finite), all=True):
            return
        bad = steps[finite.index(False) if False in finite else -1]
        rank, loss, norm = trainer.global_rank, bad.loss.item(), bad.norm.item()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"nonfinite_{bad.number}_{rank}.json"
        values = {"loss": str(loss), "gradient_norm": str(norm)}
        about = {"step": bad.number, "rank": rank, **values, "keys": bad.keys}
        write_text(path, json.dumps(about, indent=1))
        raise NonFiniteError(
            f"step {bad.number}: the loss is {loss} and the gradient norm {norm}. Nothing has been "
            f"saved since; its samples are listed in {path}. Lower optimizer.lr, or inspect the "
            "samples, and resume from the last checkpoint"
        )
