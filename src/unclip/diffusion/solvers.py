"""Samplers that solve the diffusion ODE, or its SDE, by multistep methods in log-SNR.

They have the signature of those in `unclip.diffusion.samplers`, predict x0 (so that it can be
clipped), spend one evaluation a step, and end at the last evaluation's x0. With α = √ᾱ and
σ = √(1 - ᾱ), λ = log α/σ is the time in which they are exact for a constant x0.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from unclip.diffusion.gaussian import GaussianDiffusion
from unclip.diffusion.noise import randn
from unclip.diffusion.samplers import Callback, Denoise, Generators, report

FEW_STEPS = 15  # below this many, the last step is of first order (Lu et al. 2022, section 5)


class Levels(NamedTuple):
    """α, σ and λ at the timesteps of a run."""

    alpha: list[float]
    sigma: list[float]
    lam: list[float]


def _levels(diffusion: GaussianDiffusion, timesteps: Sequence[int]) -> Levels:
    alpha_bar = diffusion.alpha_bar[list(timesteps)]
    half_log_snr = 0.5 * (alpha_bar.log() - (-alpha_bar).log1p())
    return Levels(alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist(), half_log_snr.tolist())


def _is_of_first_order(i: int, steps: int) -> bool:
    """Whether the step from evaluation `i` to the next has no slope to go by, or should not."""
    return i == 0 or (i + 2 == steps and steps < FEW_STEPS)


def dpm_solver_pp_2m(
    denoise: Denoise,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    *,
    steps: int,
    generators: Generators,
    spacing: str | Sequence[int] = "log_snr",
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, deterministic."""
    timesteps = diffusion.spacing(spacing, steps)
    alpha, sigma, lam = _levels(diffusion, timesteps)
    x, previous = x_T, None
    for i, t in enumerate(timesteps):
        x0 = denoise(x, t).x0
        report(callback, i, len(timesteps), x0)
        if i + 1 == len(timesteps):
            return x0
        h = lam[i + 1] - lam[i]
        middle = x0
        if not _is_of_first_order(i, len(timesteps)):
            middle = x0 + 0.5 * h / (lam[i] - lam[i - 1]) * (x0 - previous)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * middle
        previous = x0
    return x


def dpm_solver_pp_2m_sde(
    denoise: Denoise,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    *,
    steps: int,
    generators: Generators,
    spacing: str | Sequence[int] = "log_snr",
    callback: Callback | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, section 5.1): second order, with fresh noise."""
    timesteps = diffusion.spacing(spacing, steps)
    alpha, sigma, lam = _levels(diffusion, timesteps)
    x, previous = x_T, None
    for i, t in enumerate(timesteps):
        x0 = denoise(x, t).x0
        report(callback, i, len(timesteps), x0)
        if i + 1 == len(timesteps):
            return x0
        h = lam[i + 1] - lam[i]
        middle = x0
        if not _is_of_first_order(i, len(timesteps)):
            middle = x0 + 0.5 * h / (lam[i] - lam[i - 1]) * (x0 - previous)
        kept = sigma[i + 1] / sigma[i] * math.exp(-h)
        fresh = sigma[i + 1] * math.sqrt(-math.expm1(-2 * h))
        x = kept * x - alpha[i + 1] * math.expm1(-2 * h) * middle
        x = x + fresh * randn(x.shape[1:], generators, x.device)
        previous = x0
    return x


def unipc(
    denoise: Denoise,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    *,
    steps: int,
    generators: Generators,
    spacing: str | Sequence[int] = "log_snr",
    callback: Callback | None = None,
) -> Tensor:
    """UniPC of order 2 (Zhao et al. 2023, algorithms 5 and 6, B(h) = e^h - 1), deterministic.

    Its predictor is DPM-Solver++(2M). Its corrector repeats each step once its end has been
    evaluated, with that evaluation as one more node, so that it costs none.
    """
    timesteps = diffusion.spacing(spacing, steps)
    alpha, sigma, lam = _levels(diffusion, timesteps)
    x, start, previous, before = x_T, None, None, None
    for i, t in enumerate(timesteps):
        x0 = denoise(x, t).x0
        report(callback, i, len(timesteps), x0)
        if i + 1 == len(timesteps):
            return x0
        if i > 0:
            slope = None
            h = lam[i] - lam[i - 1]
            if not _is_of_first_order(i - 1, len(timesteps)):
                slope = (before - previous, (lam[i - 2] - lam[i - 1]) / h)
            middle = _corrected(previous, x0, slope, h)
            x = sigma[i] / sigma[i - 1] * start - alpha[i] * math.expm1(-h) * middle
        start, before, previous = x, previous, x0
        h = lam[i + 1] - lam[i]
        middle = x0
        if not _is_of_first_order(i, len(timesteps)):
            middle = x0 + 0.5 * h / (lam[i] - lam[i - 1]) * (x0 - before)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * middle
    return x


def _corrected(x0: Tensor, end: Tensor, slope: tuple[Tensor, float] | None, h: float) -> Tensor:
    """The constant x0 that stands for a step's changing one (Zhao et al. 2023, eq. 9).

    Args:
        x0: at the step's start.
        end: at its end.
        slope: x0's change to the evaluation before, and where that lies in units of the step.
        h: the step in λ.
    """
    if slope is None:
        return x0 + 0.5 * (end - x0)
    change, where = slope
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    first, second = phi_2 / phi_1, 2 * phi_3 / phi_1
    weight = (second - first) / (where - 1)
    return x0 + weight * change / where + (first - weight) * (end - x0)
