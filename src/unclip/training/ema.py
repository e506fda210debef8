"""An exponential moving average of a stage's trainable weights."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from unclip.training.sharding import own, part_of, whole_of


class EMA(Callback):
    """Averages the trainable float parameters of `module.stage` after each optimizer step.

    Validation runs with the averages, and whatever happens the raw weights come back. Buffers are
    not averaged, frozen parameters not copied. List it before every callback that looks at the
    weights.

    Args:
        decay: of the average, once warmed up.
        warm_up: whether the t-th update decays by min(decay, (1 + t) / (10 + t)) only, which
            forgets the random start.
    """

    def __init__(self, decay: float = 0.9999, *, warm_up: bool = True):
        self.decay = decay
        self.warm_up = warm_up
        self.updates = 0
        self.weights: dict[str, Tensor] = {}
        self._parameters: dict[str, Tensor] = {}
        self._swapped = False
        self._last_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts from the weights as they are, unless a checkpoint has brought averages.

        Raises:
            ValueError: when the checkpoint's averages are of another network.
        """
        self._parameters = {
            name: parameter
            for name, parameter in pl_module.stage.named_parameters()
            if parameter.requires_grad and parameter.is_floating_point()
        }
        if self.weights:
            self._place()
        else:
            self.weights = {name: own(p).clone() for name, p in self._parameters.items()}

    def _place(self) -> None:
        """Puts whole averages where the parameters are: on their device, in their shards."""
        shapes = {name: p.shape for name, p in self._parameters.items()}
        if shapes != {name: average.shape for name, average in self.weights.items()}:
            raise ValueError(
                "the checkpoint's averaged weights are of another network: resume with the "
                "configuration that it was trained with (config.yaml beside it)"
            )
        self.weights = {
            name: part_of(self.weights[name], parameter)
            for name, parameter in self._parameters.items()
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the step that a checkpoint restored."""
        self._last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes the step into the average, when the batch made one."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        self.updates += 1
        decay = self.decay
        if self.warm_up:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            list(self.weights.values()), list(map(own, self._parameters.values())), weight=1 - decay
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The stage has the averages inside, and its own weights again after, come what may."""
        if self._swapped:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchanges storage, not values, except of shards, whose storage FSDP holds on to."""
        for name, parameter in self._parameters.items():
            if isinstance(parameter, DTensor):
                raw = own(parameter).clone()
                own(parameter).copy_(self.weights[name])
                self.weights[name].copy_(raw)
            else:
                parameter.data, self.weights[name] = self.weights[name], parameter.data
        self._swapped = not self._swapped

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the averages in."""
        if self._parameters and not self._swapped:
            self._swap()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes them out."""
        if self._swapped:
            self._swap()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Takes them out before any callback after this one saves."""
        if self._swapped:
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        """The averages and how many updates made them."""
        weights = {
            name: whole_of(average, self._parameters.get(name, average))
            for name, average in self.weights.items()
        }
        return {"updates": self.updates, "weights": weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a checkpoint's averages; of shards it is read when the fit has started."""
        self.updates = state_dict["updates"]
        self.weights = dict(state_dict["weights"])
        if self._parameters:
            self._place()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps raw and averaged weights in their places in what is written amid validation."""
        if not self._swapped:
            return
        saved = dict(checkpoint["callbacks"][self.state_key]["weights"])
        for name, raw in saved.items():
            key = f"stage.{name}"
            saved[name], checkpoint["state_dict"][key] = checkpoint["state_dict"][key], raw
        checkpoint["callbacks"][self.state_key]["weights"] = saved


def averaged_weights(trainer: Trainer):
    """A context in which the trainer's stage has its averaged weights, if it keeps any."""
    for callback in trainer.callbacks:
        if isinstance(callback, EMA):
            return callback.averaged()
    return nullcontext()
