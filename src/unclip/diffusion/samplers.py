"""Samplers: one function an algorithm, from noise x_T to x0.

Each takes `denoise(x_t, t) -> Prediction` and knows nothing of text, guidance or parameterisation.
All end at x0: the last evaluation's x0 is the sample.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unclip.diffusion.gaussian import GaussianDiffusion, Prediction
from unclip.diffusion.noise import randn

Denoise = Callable[[Tensor, int], Prediction]
Callback = Callable[[int, int, Tensor], None]
Generators = Sequence[torch.Generator]


def _report(callback: Callback | None, step: int, steps: int, x0: Tensor) -> None:
    if callback is not None:
        callback(step + 1, steps, x0)


def ddpm(
    denoise: Denoise,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    *,
    steps: int,
    generators: Generators,
    spacing: str = "linear",
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling over any timestep list, with the diffusion's variance (Ho et al. 2020)."""
    alpha_bar = diffusion.alpha_bar.tolist()
    timesteps = diffusion.spacing(spacing, steps)
    x = x_T
    for i, t in enumerate(timesteps):
        prediction = denoise(x, t)
        _report(callback, i, len(timesteps), prediction.x0)
        if i + 1 == len(timesteps):
            return prediction.x0
        now, then = alpha_bar[t], alpha_bar[timesteps[i + 1]]
        beta = 1 - now / then
        small = beta * (1 - then) / (1 - now)
        mean = (
            beta * math.sqrt(then) / (1 - now) * prediction.x0
            + (1 - then) * math.sqrt(1 - beta) / (1 - now) * x
        )
        if prediction.variance_fraction is not None:
            fraction = prediction.variance_fraction
            log_variance = fraction * math.log(beta) + (1 - fraction) * math.log(small)
            deviation = torch.exp(0.5 * log_variance)
        else:
            deviation = math.sqrt(beta if diffusion.variance == "fixed_large" else small)
        x = mean + deviation * randn(x.shape[1:], generators, x.device)
    return x


def ddim(
    denoise: Denoise,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    *,
    steps: int,
    generators: Generators,
    spacing: str = "linear",
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12); eta 0 is deterministic, 1 is ancestral."""
    alpha_bar = diffusion.alpha_bar.tolist()
    timesteps = diffusion.spacing(spacing, steps)
    x = x_T
    for i, t in enumerate(timesteps):
        prediction = denoise(x, t)
        _report(callback, i, len(timesteps), prediction.x0)
        if i + 1 == len(timesteps):
            return prediction.x0
        now, then = alpha_bar[t], alpha_bar[timesteps[i + 1]]
        sigma = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
        x = math.sqrt(then) * prediction.x0 + math.sqrt(1 - then - sigma**2) * prediction.eps
        if sigma > 0:
            x = x + sigma * randn(x.shape[1:], generators, x.device)
    return x


def dpm_solver_pp_2m(
    denoise: Denoise,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    *,
    steps: int,
    generators: Generators,
    spacing: str = "log_snr",
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one evaluation a step.

    The first step is of first order, and so is the one before the last where steps are few.
    """
    timesteps = diffusion.spacing(spacing, steps)
    alpha_bar = diffusion.alpha_bar.tolist()
    alpha = [math.sqrt(alpha_bar[t]) for t in timesteps]
    sigma = [math.sqrt(1 - alpha_bar[t]) for t in timesteps]
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    x, previous = x_T, None
    for i, t in enumerate(timesteps):
        x0 = denoise(x, t).x0
        _report(callback, i, len(timesteps), x0)
        if i + 1 == len(timesteps):
            return x0
        h = lam[i + 1] - lam[i]
        D = x0
        if previous is not None and not (i + 2 == len(timesteps) and len(timesteps) < 15):
            r = (lam[i] - lam[i - 1]) / h
            D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * D
        previous = x0
    return x
