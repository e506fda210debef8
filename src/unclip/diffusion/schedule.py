"""Noise schedules and the timesteps that a sampler visits, in float64."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor


def cosine_alpha_bar(timesteps: int, max_beta: float = 0.999) -> Float64[Tensor, " timesteps"]:
    """ᾱ_t of the cosine schedule (Nichol & Dhariwal 2021, eq. 17), each β capped at `max_beta`."""

    def alpha_bar(fraction: float) -> float:
        return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [
        min(1 - alpha_bar((t + 1) / timesteps) / alpha_bar(t / timesteps), max_beta)
        for t in range(timesteps)
    ]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), dim=0)


def linear_alpha_bar(timesteps: int) -> Float64[Tensor, " timesteps"]:
    """ᾱ_t of the linear schedule (Ho et al. 2020): β from 1e-4 to 0.02 at 1000 steps."""
    scale = 1000 / timesteps
    betas = torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "cosine": cosine_alpha_bar,
    "linear": linear_alpha_bar,
}


def _descending(timesteps: list[int]) -> list[int]:
    """The list made strictly decreasing and kept at or above 0, its first element unchanged."""
    kept = timesteps[:1]
    for t in timesteps[1:]:
        if t < kept[-1]:
            kept.append(t)
    return kept


def linear_spacing(alpha_bar: Tensor, steps: int) -> list[int]:
    """Evenly from T-1 down to 0, both included, each rounded to the nearest step."""
    last = len(alpha_bar) - 1
    if steps == 1:
        return [last]
    return _descending([round(last * (1 - k / (steps - 1))) for k in range(steps)])


def trailing_spacing(alpha_bar: Tensor, steps: int) -> list[int]:
    """Evenly from T-1 down, the last above 0 (Lin et al. 2024, table 2)."""
    total = len(alpha_bar)
    return _descending([max(round(total * (1 - k / steps)) - 1, 0) for k in range(steps)])


def log_snr_spacing(
    alpha_bar: Tensor, steps: int, lowest: float = -7.0, highest: float = 7.0
) -> list[int]:
    """Evenly in log signal-to-noise ratio, which spends steps where a solver errs (Lu et al. 2022).

    The ends of a schedule, where log-SNR runs away and nothing happens, are cut off at `lowest` and
    `highest`; the first timestep is T-1 all the same, since sampling starts from pure noise.
    """
    log_snr = torch.log(alpha_bar) - torch.log1p(-alpha_bar)
    if steps == 1:
        return [len(alpha_bar) - 1]
    low, high = max(log_snr[-1].item(), lowest), min(log_snr[0].item(), highest)
    targets = torch.linspace(low, high, steps, dtype=alpha_bar.dtype)
    nearest = (log_snr[None, :] - targets[:, None]).abs().argmin(dim=1).tolist()
    return _descending([len(alpha_bar) - 1, *nearest[1:]])


SPACINGS: dict[str, Callable[[Tensor, int], list[int]]] = {
    "linear": linear_spacing,
    "trailing": trailing_spacing,
    "log_snr": log_snr_spacing,
}
