"""An exponential moving average of a stage's trainable weights.

Lightning's EMAWeightAveraging saves raw and averaged weights swapped after an exception in
validation, loses the raw weights after fit, and has no warm-up.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from unclip.training.lightning_compat import find_callback
from unclip.training.modules import StageModule
from unclip.training.sharding import full_tensor, local_tensor, shard_like


class EMA(Callback):
    """Average the trainable float parameters of `module.stage` after each optimizer step.

    Validation runs with the averages; the raw weights are always restored. Buffers are not
    averaged, and frozen parameters are not copied. List it before all callbacks that use the
    weights.

    Update t decays by min(decay, (1 + t) / (10 + t)), which forgets the random initial weights.
    """

    def __init__(self, decay: float = 0.9999):
        self.decay = decay
        self.updates = 0
        self.weights: dict[str, Tensor] = {}
        self._parameters: dict[str, Tensor] = {}
        self._swapped = False
        self._last_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: StageModule) -> None:
        """Start from the initial weights, or from the averages of a checkpoint."""
        self._parameters = {
            name: parameter
            for name, parameter in pl_module.stage.named_parameters()
            if parameter.requires_grad and parameter.is_floating_point()
        }
        if self.weights:
            self._place()
        else:
            self.weights = {name: local_tensor(p).clone() for name, p in self._parameters.items()}

    def _place(self) -> None:
        """Move full averages to the parameters' device, and shard them as the parameters are."""
        self.weights = {n: shard_like(self.weights[n], p) for n, p in self._parameters.items()}

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self.updates += 1
        update = get_ema_multi_avg_fn(min(self.decay, (1 + self.updates) / (10 + self.updates)))
        weights = [local_tensor(parameter) for parameter in self._parameters.values()]
        update(list(self.weights.values()), weights, None)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Swap in the EMA weights; always restore on exit what was there before."""
        before = self._swapped
        self._swap(True)
        try:
            yield
        finally:
            self._swap(before)

    @torch.no_grad()
    def _swap(self, averaged: bool) -> None:
        """Put the averaged or the raw weights into the stage, by value: FSDP keeps its storage."""
        if averaged == self._swapped:
            return
        for name, parameter in self._parameters.items():
            weight = local_tensor(parameter)
            other = weight.clone()
            weight.copy_(self.weights[name])
            self.weights[name].copy_(other)
        self._swapped = averaged

    def on_validation_start(self, *_: Any) -> None:
        self._swap(True)

    def on_validation_end(self, *_: Any, **__: Any) -> None:
        self._swap(False)

    on_exception = on_validation_end  # before a later callback saves them

    def state_dict(self) -> dict[str, Any]:
        weights = {
            name: full_tensor(average, self._parameters.get(name, average))
            for name, average in self.weights.items()
        }
        return {"updates": self.updates, "weights": weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a checkpoint's averages, which are sharded when the fit starts."""
        self.updates = state_dict["updates"]
        self.weights = dict(state_dict["weights"])
        if self._parameters:
            self._place()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: StageModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put raw and averaged weights in their places if validation has swapped them."""
        if not self._swapped:
            return
        saved = dict(checkpoint["callbacks"][self.state_key]["weights"])
        for name, raw in saved.items():
            key = f"stage.{name}"
            saved[name], checkpoint["state_dict"][key] = checkpoint["state_dict"][key], raw
        checkpoint["callbacks"][self.state_key]["weights"] = saved


def averaged_weights(trainer: Trainer) -> AbstractContextManager[None]:
    """Return a context in which the stage has its averaged weights, if the trainer has an EMA."""
    ema = find_callback(trainer, EMA)
    return nullcontext() if ema is None else ema.averaged()
