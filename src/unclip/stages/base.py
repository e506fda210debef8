"""What every stage is: a torch module that has a loss and can sample."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unclip.diffusion import GaussianDiffusion
from unclip.diffusion.samplers import Callback

Batch = dict[str, Any]


class Stage(nn.Module):
    """One trainable part of the cascade.

    Attributes:
        name: the stage's word, such as "decoder".
        needs_clip: whether its batches carry CLIP's features of image and caption.
    """

    name: str
    needs_clip: bool

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """The tensors of a batch that the network is conditioned on."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """A differentiable scalar, "loss", and detached scalars that are worth logging."""
        raise NotImplementedError

    def sample(
        self,
        condition: dict[str, Tensor],
        *,
        generators: Sequence[torch.Generator],
        guidance_scale: float | None = None,
        steps: int | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """One sample a row of `condition`, its noise from that row's CPU generator.

        `guidance_scale` and `steps` stand in for the stage's own; `callback(step, steps, x0)` is
        called after each evaluation of the network.
        """
        raise NotImplementedError

    def fit_statistics(self, batches: Iterable[Batch]) -> None:
        """Fits what the stage needs to know of the data before training; most need nothing."""

    def fit_null_text(self, empty: Batch) -> None:
        """Takes CLIP's features of an empty caption, where the stage asks for them."""

    def fit_variance(self, batches: Iterable[Batch]) -> None:
        """Fits what sampling needs to know of the trained network; most need nothing."""


class DiffusionStage(Stage):
    """A stage that is a network joined to a diffusion process and sampled by a sampler.

    Args:
        network: what is trained.
        diffusion: the process.
        sampler: a sampler of `unclip.diffusion` with its steps bound.
    """

    def __init__(
        self, network: nn.Module, diffusion: GaussianDiffusion, sampler: Callable[..., Tensor]
    ):
        super().__init__()
        self.network = network
        self.diffusion = diffusion
        self.sampler = sampler

    def _sample(
        self,
        network: Callable[[Tensor, Tensor], Tensor],
        noise: Tensor,
        *,
        clip: float | None,
        percentile: float | None = None,
        generators: Sequence[torch.Generator],
        steps: int | None,
        callback: Callback | None,
    ) -> Tensor:
        override = {} if steps is None else {"steps": steps}
        return self.sampler(
            self.diffusion.denoiser(network, clip, percentile),
            noise,
            self.diffusion,
            generators=generators,
            callback=callback,
            **override,
        )


def mean_losses(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per-sample losses as scalars, all but "loss" detached."""
    return {
        name: value.mean() if name == "loss" else value.detach().mean()
        for name, value in losses.items()
    }


def timestep_quartiles(loss: Tensor, t: Tensor, timesteps: int) -> dict[str, Tensor]:
    """The mean loss in each quarter of the timesteps that the batch has samples in."""
    quartile = 4 * t // timesteps
    parts = {f"loss_q{k}": loss.detach()[quartile == k] for k in range(4)}
    return {name: part.mean() for name, part in parts.items() if len(part)}
