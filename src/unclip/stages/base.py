"""The interface of a stage: a torch module with a loss that can be sampled."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unclip.batch import Batch
from unclip.diffusion import GaussianDiffusion
from unclip.diffusion.samplers import Callback, Denoise


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


class Noised(NamedTuple):
    """Training samples noised to random timesteps; each field has one row per sample."""

    x0: Tensor
    noise: Tensor
    x_t: Tensor
    t: Tensor


class DiffusionStage(Stage):
    """A stage that joins a network, a diffusion process and a sampler.

    Args:
        network: the trained network.
        diffusion: the diffusion process.
        sampler: a sampler of `unclip.diffusion` with its steps bound by `functools.partial`.

    Attributes:
        clip_range: bound on |x0| in sampling; None is no bound.
    """

    clip_range: float | None = 1.0

    def __init__(
        self, network: nn.Module, diffusion: GaussianDiffusion, sampler: Callable[..., Tensor]
    ):
        super().__init__()
        self.network = network
        self.diffusion = diffusion
        self.sampler = sampler

    def bind(
        self, condition: dict[str, Tensor], guidance_scale: float | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return `network(x_t, t)` under a condition; a scale of None is the stage's own."""
        raise NotImplementedError

    def noise(
        self, condition: dict[str, Tensor], generators: Sequence[torch.Generator]
    ) -> Float[Tensor, "batch ..."]:
        """Return the noise x_T of each row of `condition`."""
        raise NotImplementedError

    def denoiser(
        self, condition: dict[str, Tensor], guidance_scale: float | None = None
    ) -> Denoise:
        """Return `denoise(x_t, t)` for a sampler; a scale of None is the stage's own."""
        return self.diffusion.denoiser(self.bind(condition, guidance_scale), self.clip_range)

    @torch.no_grad()
    def sample(
        self,
        condition: dict[str, Tensor],
        *,
        generators: Sequence[torch.Generator],
        guidance_scale: float | None = None,
        steps: int | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Return one sample per row of `condition` (see `Stage.sample`)."""
        override = {} if steps is None else {"steps": steps}
        x0 = self.sampler(
            self.denoiser(condition, guidance_scale),
            self.noise(condition, generators),
            self.diffusion,
            generators=generators,
            callback=callback,
            **override,
        )
        return self._finish(x0, condition)

    def _finish(self, x0: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Turn the sampler's x0 into the stage's output; the default returns it unchanged."""
        return x0

    def _noised(self, x0: Float[Tensor, "batch ..."]) -> Noised:
        noise = torch.randn_like(x0)
        t = self.diffusion.sample_timesteps(len(x0), x0.device)
        return Noised(x0, noise, self.diffusion.add_noise(x0, noise, t), t)

    def _losses(self, output: Tensor, noised: Noised) -> dict[str, Tensor]:
        """Return the mean loss, its detached parts, and the error in each quarter of the timesteps.

        The error of a quarter without samples in the batch is NaN. Leaving it out would make a GPU
        wait for the timesteps.
        """
        losses = self.diffusion.loss(output, *noised)
        means = {name: values.detach().mean() for name, values in losses.items()}
        quarters = torch.arange(4, device=noised.t.device)[:, None]
        inside = 4 * noised.t // self.diffusion.timesteps == quarters  # (4, B)
        sums = torch.where(inside, losses["mse"].detach(), 0.0).sum(dim=1)
        for k, mean in enumerate(sums / inside.sum(dim=1)):
            means[f"loss_q{k}"] = mean
        return means | {"loss": losses["loss"].mean()}
