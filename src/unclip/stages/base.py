"""The interface of a stage: a torch module with a loss that can be sampled."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from unclip.batch import Batch
from unclip.diffusion import GaussianDiffusion
from unclip.diffusion.samplers import Callback


class Stage(nn.Module):
    """One trainable part of the cascade.

    Attributes:
        name: name of the stage, such as "decoder".
        needs_clip: whether batches must contain CLIP's features of images and captions.
    """

    name: str
    needs_clip: bool

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """Return the tensors of a batch that the network is conditioned on."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return a differentiable scalar, "loss", and detached scalars for the logs."""
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
        """Return one sample per row of `condition`.

        Args:
            condition: result of `condition`.
            generators: CPU generator of each row's noise.
            guidance_scale: guidance scale; None is the stage's own.
            steps: number of sampling steps; None is the sampler's own.
            callback: `callback(step, steps, x0)`, called after each network evaluation.
        """
        raise NotImplementedError

    def fit_statistics(self, batches: Iterable[Batch]) -> None:
        """Fit statistics of the data before training; the default does nothing."""

    def fit_null_text(self, empty: Batch) -> None:
        """Store CLIP's features of the empty caption, if the stage uses them as its null."""

    def fit_variance(self, batches: Iterable[Batch]) -> None:
        """Fit the sampling variance of the trained network; the default does nothing."""


class DiffusionStage(Stage):
    """A stage that joins a network, a diffusion process and a sampler.

    Args:
        network: the trained network.
        diffusion: the diffusion process.
        sampler: a sampler of `unclip.diffusion` with its steps bound by `functools.partial`.
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
        clip_range: float | None,
        generators: Sequence[torch.Generator],
        steps: int | None,
        callback: Callback | None,
    ) -> Tensor:
        override = {} if steps is None else {"steps": steps}
        return self.sampler(
            self.diffusion.denoiser(network, clip_range),
            noise,
            self.diffusion,
            generators=generators,
            callback=callback,
            **override,
        )


def mean_losses(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Average per-sample losses; all except "loss" are detached."""
    return {
        name: value.mean() if name == "loss" else value.detach().mean()
        for name, value in losses.items()
    }


def timestep_quartiles(loss: Tensor, t: Tensor, timesteps: int) -> dict[str, Tensor]:
    """Return the mean loss in each quarter of the timesteps that has samples in the batch."""
    quartile = 4 * t // timesteps
    parts = {f"loss_q{k}": loss.detach()[quartile == k] for k in range(4)}
    return {name: part.mean() for name, part in parts.items() if len(part)}
