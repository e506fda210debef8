"""Noise schedules, timestep spacings and the density of training timesteps."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

MAX_BETA = 0.999
LOG_SNR_RANGE = (-7.0, 7.0)  # outside it, log-SNR diverges and samples hardly change


def cosine_alpha_bar(timesteps: int) -> Float64[Tensor, " timesteps"]:
    """Return ᾱ_t of the cosine schedule (Nichol & Dhariwal 2021, eq. 17) with capped β."""

    def alpha_bar(fraction: float) -> float:
        return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [
        min(1 - alpha_bar((t + 1) / timesteps) / alpha_bar(t / timesteps), MAX_BETA)
        for t in range(timesteps)
    ]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), dim=0)


def linear_alpha_bar(timesteps: int) -> Float64[Tensor, " timesteps"]:
    """Return ᾱ_t of the linear schedule (Ho et al. 2020): β from 1e-4 to 0.02 at 1000 steps.

    β is capped, which matters below 20 steps.
    """
    scale = 1000 / timesteps
    betas = torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)
    return torch.cumprod(1 - betas.clamp(max=MAX_BETA), dim=0)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "cosine": cosine_alpha_bar,
    "linear": linear_alpha_bar,
}


def log_snr(alpha_bar: Tensor) -> Tensor:
    """Return log ᾱ / (1 - ᾱ), which is -∞ at pure noise."""
    return torch.log(alpha_bar) - torch.log1p(-alpha_bar)


def linspace_timesteps(alpha_bar: Tensor, steps: int) -> list[int]:
    """Return timesteps evenly spaced from T-1 to 0, both included, rounded to integers."""
    last = len(alpha_bar) - 1
    timesteps = {round(last * (1 - k / max(steps - 1, 1))) for k in range(steps)}
    return sorted(timesteps, reverse=True)


def log_snr_timesteps(alpha_bar: Tensor, steps: int) -> list[int]:
    """Return T-1, then timesteps evenly spaced in log-SNR, as multistep solvers need them.

    The ends of the schedule are cut off at `LOG_SNR_RANGE`, except for T-1, since sampling starts
    from pure noise (Lu et al. 2022).
    """
    levels = log_snr(alpha_bar)
    low = max(levels[-1].item(), LOG_SNR_RANGE[0])
    high = min(levels[0].item(), LOG_SNR_RANGE[1])
    targets = torch.linspace(low, high, steps, dtype=alpha_bar.dtype)[1:]
    nearest = (levels - targets[:, None]).abs().argmin(dim=1)
    return sorted({len(alpha_bar) - 1, *nearest.tolist()}, reverse=True)


TIMESTEP_SPACINGS: dict[str, Callable[[Tensor, int], list[int]]] = {
    "linspace": linspace_timesteps,
    "log_snr": log_snr_timesteps,
}


@dataclass(frozen=True)
class LogitNormal:
    """Density of σ(N(mean, std²)) on (0, 1) (Esser et al. 2024, section 3.1).

    Args:
        mean: mean of the normal distribution; positive values favor high noise.
        std: its standard deviation; small values concentrate the timesteps.

    Raises:
        ValueError: the standard deviation is not positive.
    """

    mean: float
    std: float

    def __post_init__(self):
        if self.std <= 0:
            raise ValueError(f"std of a logit-normal density is {self.std}; it must be positive")

    def quantile(self, u: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Map uniform fractions to this density by its inverse CDF."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
