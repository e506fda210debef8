"""Inpainting: a sampler that is told part of the picture."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unclip.diffusion.gaussian import GaussianDiffusion
from unclip.diffusion.noise import randn
from unclip.diffusion.samplers import Callback, Denoise, Generators, ddim_step, report


def inpaint(
    denoise: Denoise,
    x_T: Float[Tensor, "batch ..."],
    diffusion: GaussianDiffusion,
    *,
    known: Float[Tensor, "batch ..."],
    mask: Bool[Tensor, "batch ..."],
    steps: int,
    generators: Generators,
    spacing: str | Sequence[int] = "linear",
    eta: float = 1.0,
    jump: int = 5,
    resamplings: int = 3,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM in which the known part is noised anew for each step (Lugmayr et al. 2022, algorithm 1).

    What is painted at a step knows little of what is known; so every `jump` steps the whole is
    noised back by as many, and painted again.

    Args:
        denoise: the denoiser.
        x_T: noise.
        diffusion: its process.
        known: the clean sample where it is known; elsewhere anything.
        mask: true where it shall be painted; broadcasts to `known`.
        steps: how many timesteps; up to `resamplings` times as many evaluations.
        generators: one a sample.
        spacing: as of `ddim`.
        eta: as of `ddim`; 1 is ancestral.
        jump: steps that are painted again together.
        resamplings: how often each is painted, but for those after the last jump; 1 is never again.
        callback: `callback(evaluation, evaluations, x0)`.

    Returns:
        x0, in its known part `known` to the bit.
    """
    if jump < 1 or resamplings < 1:
        raise ValueError(f"jump is {jump} and resamplings {resamplings}; both are 1 or more")
    alpha_bar = diffusion.alpha_bar.tolist()
    timesteps = diffusion.spacing(spacing, steps)
    places = walk(len(timesteps), jump, resamplings)
    evaluations = 1 + sum(then > now for now, then in pairwise(places))

    def noised(clean: Tensor, signal: float) -> Tensor:
        noise = randn(clean.shape[1:], generators, clean.device)
        return math.sqrt(signal) * clean + math.sqrt(1 - signal) * noise

    x = torch.where(mask, x_T, noised(known, alpha_bar[timesteps[0]]))
    evaluation = 0
    for place, following in pairwise(places):
        now, then = alpha_bar[timesteps[place]], alpha_bar[timesteps[following]]
        if following < place:
            x = noised(x, then / now)
            continue
        prediction = denoise(x, timesteps[place])
        report(callback, evaluation, evaluations, prediction.x0)
        evaluation += 1
        x, deviation = ddim_step(prediction, now, then, eta)
        x = x + deviation * randn(x.shape[1:], generators, x.device)
        x = torch.where(mask, x, noised(known, then))
    x0 = denoise(x, timesteps[-1]).x0
    x0 = torch.where(mask, x0, known)
    report(callback, evaluation, evaluations, x0)
    return x0


def walk(count: int, jump: int, resamplings: int) -> list[int]:
    """The places in a list of `count` timesteps in the order that they are visited.

    Every `jump` places it goes back as many, until they were passed `resamplings` times.
    """
    returns = {place: resamplings - 1 for place in range(jump, count, jump)}
    visited = [0]
    while visited[-1] < count - 1:
        visited.append(visited[-1] + 1)
        if returns.get(visited[-1], 0):
            returns[visited[-1]] -= 1
            visited.append(visited[-1] - jump)
    return visited
