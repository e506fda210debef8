"""Multistep solvers of the diffusion ODE or SDE in log-SNR.

They have the signature of the samplers in `unclip.diffusion.samplers`, predict x0 (so that it can
be clipped), use one evaluation per step, and return the x0 of the last one. With α = √ᾱ and
σ = √(1 - ᾱ), λ = log α/σ is the time variable in which they are exact for a constant x0.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from unclip.diffusion.gaussian import GaussianDiffusion
from unclip.diffusion.samplers import Callback, Denoise, Generators, randn, with_callback

FEW_STEPS = 15  # below this many, the last step is first order (Lu et al. 2022, section 5)


def _levels(diffusion: GaussianDiffusion, timesteps: Sequence[int]) -> list[list[float]]:
    """Return α, σ and λ at the timesteps of a run."""
    alpha_bar = diffusion.cpu_alpha_bar[list(timesteps)]
    half_log_snr = 0.5 * (alpha_bar.log() - (-alpha_bar).log1p())
    return [alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist(), half_log_snr.tolist()]


def _is_first_order(i: int, steps: int) -> bool:
    """Return whether the step after evaluation `i` uses no earlier evaluation."""
    return i == 0 or (i + 2 == steps and steps < FEW_STEPS)


def _extrapolated(x0: Tensor, previous: Tensor | None, lam: list[float], i: int) -> Tensor:
    """Return D_i, x0 extrapolated to the middle of step i (Lu et al. 2022, algorithm 2)."""
    if previous is None or _is_first_order(i, len(lam)):
        return x0
    h, h_last = lam[i + 1] - lam[i], lam[i] - lam[i - 1]
    return x0 + 0.5 * h / h_last * (x0 - previous)


def dpm_solver_pp_2m(
    denoise: Denoise,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    *,
    steps: int,
    generators: Generators,
    timestep_spacing: str | Sequence[int] = "log_snr",
    callback: Callback | None = None,
) -> Tensor:
    """Sample by DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, deterministic."""
    timesteps = diffusion.sampling_timesteps(timestep_spacing, steps)
    alpha, sigma, lam = _levels(diffusion, timesteps)
    denoise = with_callback(denoise, callback, len(timesteps))
    x, previous = x_T, None
    for i, t in enumerate(timesteps[:-1]):
        x0 = denoise(x, t).x0
        h = lam[i + 1] - lam[i]
        D = _extrapolated(x0, previous, lam, i)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * D
        previous = x0
    return denoise(x, timesteps[-1]).x0


def dpm_solver_pp_2m_sde(
    denoise: Denoise,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    *,
    steps: int,
    generators: Generators,
    timestep_spacing: str | Sequence[int] = "log_snr",
    callback: Callback | None = None,
) -> Tensor:
    """Sample by SDE-DPM-Solver++(2M) (Lu et al. 2022, section 5.1): second order, fresh noise."""
    timesteps = diffusion.sampling_timesteps(timestep_spacing, steps)
    alpha, sigma, lam = _levels(diffusion, timesteps)
    denoise = with_callback(denoise, callback, len(timesteps))
    x, previous = x_T, None
    for i, t in enumerate(timesteps[:-1]):
        x0 = denoise(x, t).x0
        h = lam[i + 1] - lam[i]
        D = _extrapolated(x0, previous, lam, i)
        x = sigma[i + 1] / sigma[i] * math.exp(-h) * x - alpha[i + 1] * math.expm1(-2 * h) * D
        std = sigma[i + 1] * math.sqrt(-math.expm1(-2 * h))
        x = x + std * randn(x.shape[1:], generators, x.device)
        previous = x0
    return denoise(x, timesteps[-1]).x0


def unipc(
    denoise: Denoise,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    *,
    steps: int,
    generators: Generators,
    timestep_spacing: str | Sequence[int] = "log_snr",
    callback: Callback | None = None,
) -> Tensor:
    """Sample by UniPC of order 2 (Zhao et al. 2023, algorithms 5 and 6, B(h) = e^h - 1).

    The predictor is DPM-Solver++(2M). The corrector repeats each step after the evaluation at its
    end, with that evaluation as one more node, so it needs no evaluation of its own.
    """
    timesteps = diffusion.sampling_timesteps(timestep_spacing, steps)
    alpha, sigma, lam = _levels(diffusion, timesteps)
    denoise = with_callback(denoise, callback, len(timesteps))
    x = x_last = x_T
    x0_1 = x0_2 = None  # x0 of one and two evaluations ago
    for i, t in enumerate(timesteps[:-1]):
        x0 = denoise(x, t).x0
        if x0_1 is not None:
            h = lam[i] - lam[i - 1]
            node = None
            if x0_2 is not None and not _is_first_order(i - 1, len(timesteps)):
                node = (x0_2 - x0_1, (lam[i - 2] - lam[i - 1]) / h)
            D = _corrected(x0_1, x0, node, h)
            x = sigma[i] / sigma[i - 1] * x_last - alpha[i] * math.expm1(-h) * D
        x_last, x0_2, x0_1 = x, x0_1, x0
        h = lam[i + 1] - lam[i]
        D = _extrapolated(x0, x0_2, lam, i)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * D
    return denoise(x, timesteps[-1]).x0


def _corrected(x0: Tensor, x0_end: Tensor, node: tuple[Tensor, float] | None, h: float) -> Tensor:
    """Return the constant x0 that replaces a step's changing one (Zhao et al. 2023, eq. 9).

    Args:
        x0: x0 at the step's start.
        x0_end: x0 at the step's end.
        node: difference between the previous evaluation's x0 and `x0`, and the position r of that
            evaluation in units of the step; None for first order.
        h: size of the step in λ.
    """
    if node is None:
        return x0 + 0.5 * (x0_end - x0)
    difference, r = node
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    first, second = phi_2 / phi_1, 2 * phi_3 / phi_1
    rho = (second - first) / (r - 1)
    return x0 + rho * difference / r + (first - rho) * (x0_end - x0)
