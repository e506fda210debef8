"""Samplers by Markov chain and by DDIM: one function an algorithm, from noise x_T to x0.

Each takes `denoise(x_t, t) -> Prediction` and knows nothing of text, guidance or parameterisation.
All end at x0: the last evaluation's x0 is the sample. `spacing` is a name or list of timesteps as
`GaussianDiffusion.spacing` takes it; `callback(step, steps, x0)` is called after each evaluation,
and what it raises ends the sampling.
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


def report(callback: Callback | None, step: int, steps: int, x0: Tensor) -> None:
    """Tells the callback, where there is one, that evaluation `step`, from 0, is done."""
    if callback is not None:
        callback(step + 1, steps, x0)


def ddpm(
    denoise: Denoise,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    *,
    steps: int,
    generators: Generators,
    spacing: str | Sequence[int] = "linear",
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling over any timestep list, with the diffusion's variance (Ho et al. 2020).

    An analytic variance is that of the posterior, widened by what the network does not know of x0
    (Bao et al. 2022, theorem 1).
    """
    alpha_bar = diffusion.alpha_bar.tolist()
    timesteps = diffusion.spacing(spacing, steps)
    x = x_T
    for i, t in enumerate(timesteps):
        prediction = denoise(x, t)
        report(callback, i, len(timesteps), prediction.x0)
        if i + 1 == len(timesteps):
            return prediction.x0
        now, then = alpha_bar[t], alpha_bar[timesteps[i + 1]]
        beta = 1 - now / then
        small = beta * (1 - then) / (1 - now)
        from_x0 = beta * math.sqrt(then) / (1 - now)
        mean = from_x0 * prediction.x0 + (1 - then) * math.sqrt(1 - beta) / (1 - now) * x
        if prediction.variance_fraction is not None:
            fraction = prediction.variance_fraction
            log_variance = fraction * math.log(beta) + (1 - fraction) * math.log(small)
            deviation = torch.exp(0.5 * log_variance)
        elif diffusion.variance == "analytic":
            deviation = math.sqrt(small + from_x0**2 * diffusion.x0_error[t].item())
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
    spacing: str | Sequence[int] = "linear",
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12); eta 0 is deterministic, 1 is ancestral.

    Raises:
        ValueError: for an eta outside [0, 1].
    """
    alpha_bar = diffusion.alpha_bar.tolist()
    timesteps = diffusion.spacing(spacing, steps)
    x = x_T
    for i, t in enumerate(timesteps):
        prediction = denoise(x, t)
        report(callback, i, len(timesteps), prediction.x0)
        if i + 1 == len(timesteps):
            return prediction.x0
        now, then = alpha_bar[t], alpha_bar[timesteps[i + 1]]
        x, deviation = ddim_step(prediction, now, then, eta)
        if deviation > 0:
            x = x + deviation * randn(x.shape[1:], generators, x.device)
    return x


def ddim_step(prediction: Prediction, now: float, then: float, eta: float) -> tuple[Tensor, float]:
    """Mean and standard deviation of DDIM's step from ᾱ_t `now` to ᾱ_s `then`.

    Raises:
        ValueError: for an eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it goes from 0, no noise, to 1, as much as DDPM's")
    variance = eta**2 * ((1 - then) / (1 - now) * (1 - now / then))
    rest = max(1 - then - variance, 0.0)  # at ᾱ_t = 0 rounding may leave it below
    mean = math.sqrt(then) * prediction.x0 + math.sqrt(rest) * prediction.eps
    return mean, math.sqrt(variance)


def ddim_invert(
    denoise: Denoise,
    x0: Tensor,
    diffusion: GaussianDiffusion,
    *,
    steps: int,
    spacing: str | Sequence[int] = "linear",
    iterations: int = 1,
    callback: Callback | None = None,
) -> Tensor:
    """The noise x_T from which `ddim` with the same timesteps returns `x0` (paper, section 3.1).

    Each step solves DDIM's own step for its start, x_t = r x_s + (σ_t - r σ_s) ε(x_t, t) with
    r = √(ᾱ_t/ᾱ_s), by fixed-point iteration. One iteration is the usual inversion, whose error
    falls with the number of steps; a few more bring it to that of rounding.

    Args:
        denoise: the denoiser of the sampling that shall return to `x0`.
        x0: the clean sample.
        diffusion: its process.
        steps: of `ddim`.
        spacing: of `ddim`.
        iterations: network evaluations a step.
        callback: `callback(evaluation, evaluations, x_t's x0)`.
    """
    alpha_bar = diffusion.alpha_bar.tolist()
    timesteps = diffusion.spacing(spacing, steps)[::-1]
    x, then = x0, 1.0
    for i, t in enumerate(timesteps):
        now = alpha_bar[t]
        ratio = math.sqrt(now / then)
        noise = math.sqrt(1 - now) - ratio * math.sqrt(1 - then)
        guess = x
        for k in range(iterations):
            prediction = denoise(guess, t)
            guess = ratio * x + noise * prediction.eps
            report(callback, i * iterations + k, len(timesteps) * iterations, prediction.x0)
        x, then = guess, now
    return x
