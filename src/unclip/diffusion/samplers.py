"""DDPM and DDIM: one function per algorithm, from noise x_T to x0.

Each sampler takes `denoise(x_t, t) -> Prediction` and knows nothing of text, guidance or prediction
types. Every sampler returns the x0 of the last evaluation. `timestep_spacing` is a name or a list
of timesteps (`GaussianDiffusion.sampling_timesteps`). `callback(step, steps, x0)` is called after
each evaluation; an exception that it raises ends the sampling. A step goes from t to s < t.
"""

import math
from collections.abc import Callable, Sequence
from itertools import count, pairwise

import torch
from torch import Tensor

from unclip.device import to_device
from unclip.diffusion.gaussian import GaussianDiffusion, Prediction

Denoise = Callable[[Tensor, int], Prediction]
Callback = Callable[[int, int, Tensor], None]
Generators = Sequence[torch.Generator]


def randn(
    shape: Sequence[int], generators: Generators, device: torch.device | str = "cpu"
) -> Tensor:
    """Return standard normal noise `[len(generators), *shape]`, one row per generator.

    Each image has its own CPU generator, so its noise depends neither on the batch nor on the
    device.
    """
    rows = [torch.randn(tuple(shape), generator=generator) for generator in generators]
    return to_device(torch.stack(rows), device)


def with_callback(denoise: Denoise, callback: Callback | None, steps: int) -> Denoise:
    """Return a denoiser that calls `callback(step, steps, x0)` after each evaluation."""
    if callback is None:
        return denoise
    numbers = count(1)

    def denoise_and_call(x_t: Tensor, t: int) -> Prediction:
        prediction = denoise(x_t, t)
        callback(next(numbers), steps, prediction.x0)
        return prediction

    return denoise_and_call


def ddpm(
    denoise: Denoise,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    *,
    steps: int,
    generators: Generators,
    timestep_spacing: str | Sequence[int] = "linspace",
    callback: Callback | None = None,
) -> Tensor:
    """Sample by ancestral steps with the diffusion's variance (Ho et al. 2020, algorithm 2).

    The analytic variance is the posterior's, widened by the error of x0 (Bao et al. 2022,
    theorem 1).
    """
    alpha_bar = diffusion.cpu_alpha_bar.tolist()
    x0_error = None if diffusion.x0_error is None else diffusion.x0_error.cpu().tolist()
    timesteps = diffusion.sampling_timesteps(timestep_spacing, steps)
    denoise = with_callback(denoise, callback, len(timesteps))
    x = x_T
    for t, s in pairwise(timesteps):
        prediction = denoise(x, t)
        alpha_bar_t, alpha_bar_s = alpha_bar[t], alpha_bar[s]
        beta = 1 - alpha_bar_t / alpha_bar_s
        beta_tilde = beta * (1 - alpha_bar_s) / (1 - alpha_bar_t)
        from_x0 = beta * math.sqrt(alpha_bar_s) / (1 - alpha_bar_t)
        from_x_t = (1 - alpha_bar_s) * math.sqrt(1 - beta) / (1 - alpha_bar_t)
        mean = from_x0 * prediction.x0 + from_x_t * x
        if prediction.variance_fraction is not None:
            fraction = prediction.variance_fraction
            log_variance = fraction * math.log(beta) + (1 - fraction) * math.log(beta_tilde)
            std = torch.exp(0.5 * log_variance)
        elif x0_error is not None:
            std = math.sqrt(beta_tilde + from_x0**2 * x0_error[t])
        else:
            std = math.sqrt(beta_tilde)
        x = mean + std * randn(x.shape[1:], generators, x.device)
    return denoise(x, timesteps[-1]).x0


def ddim(
    denoise: Denoise,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    *,
    steps: int,
    generators: Generators,
    timestep_spacing: str | Sequence[int] = "linspace",
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by DDIM (Song et al. 2021, eq. 12); eta = 0 is deterministic, 1 is ancestral.

    Raises:
        ValueError: eta is not in [0, 1].
    """
    alpha_bar = diffusion.cpu_alpha_bar.tolist()
    timesteps = diffusion.sampling_timesteps(timestep_spacing, steps)
    denoise = with_callback(denoise, callback, len(timesteps))
    x = x_T
    for t, s in pairwise(timesteps):
        x, std = ddim_step(denoise(x, t), alpha_bar[t], alpha_bar[s], eta)
        if std > 0:
            x = x + std * randn(x.shape[1:], generators, x.device)
    return denoise(x, timesteps[-1]).x0


def ddim_step(
    prediction: Prediction, alpha_bar_t: float, alpha_bar_s: float, eta: float
) -> tuple[Tensor, float]:
    """Return the mean and standard deviation of DDIM's step from t to s.

    Raises:
        ValueError: eta is not in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must be from 0 (deterministic) to 1 (DDPM's noise)")
    variance = eta**2 * ((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s))
    rest = max(1 - alpha_bar_s - variance, 0.0)  # rounding at ᾱ_t = 0 can make it negative
    mean = math.sqrt(alpha_bar_s) * prediction.x0 + math.sqrt(rest) * prediction.eps
    return mean, math.sqrt(variance)


def ddim_invert(
    denoise: Denoise,
    x0: Tensor,
    diffusion: GaussianDiffusion,
    *,
    steps: int,
    timestep_spacing: str | Sequence[int] = "linspace",
    iterations: int = 1,
    callback: Callback | None = None,
) -> Tensor:
    """Return the noise x_T from which `ddim` reproduces `x0` (paper, section 3.1).

    Each step solves DDIM's step for its start, x_t = r x_s + (σ_t - r σ_s) ε(x_t, t) with
    r = √(ᾱ_t/ᾱ_s), by fixed-point iteration. One iteration is the usual inversion, whose error
    decreases with the number of steps; a few more reduce it to rounding. `iterations` is the number
    of network evaluations per step; the other arguments are those of the later `ddim` call.
    """
    alpha_bar = diffusion.cpu_alpha_bar.tolist()
    timesteps = diffusion.sampling_timesteps(timestep_spacing, steps)[::-1]
    denoise = with_callback(denoise, callback, len(timesteps) * iterations)
    x_s, alpha_bar_s = x0, 1.0
    for t in timesteps:
        alpha_bar_t = alpha_bar[t]
        r = math.sqrt(alpha_bar_t / alpha_bar_s)
        noise_scale = math.sqrt(1 - alpha_bar_t) - r * math.sqrt(1 - alpha_bar_s)
        x_t = x_s
        for _ in range(iterations):
            x_t = r * x_s + noise_scale * denoise(x_t, t).eps
        x_s, alpha_bar_s = x_t, alpha_bar_t
    return x_s
