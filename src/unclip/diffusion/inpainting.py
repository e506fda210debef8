"""Inpainting: DDIM with a known part of the image (RePaint)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unclip.diffusion.gaussian import GaussianDiffusion
from unclip.diffusion.samplers import Callback, Denoise, Generators, ddim_step, randn, with_callback


def inpaint(
    denoise: Denoise,
    x_T: Float[Tensor, "batch ..."],
    diffusion: GaussianDiffusion,
    *,
    known: Float[Tensor, "batch ..."],
    mask: Bool[Tensor, "batch ..."],
    steps: int,
    generators: Generators,
    timestep_spacing: str | Sequence[int] = "linspace",
    eta: float = 1.0,
    jump_length: int = 5,
    jump_n_sample: int = 3,
    callback: Callback | None = None,
) -> Tensor:
    """Sample the masked part by DDIM; the known part is noised at each step (Lugmayr et al. 2022).

    A single step hardly sees the known part. So every `jump_length` steps the whole image is noised
    by as many steps and sampled again (algorithm 1, section 4.2).

    Args:
        denoise: the denoiser.
        x_T: the noise that sampling starts from.
        diffusion: the diffusion process.
        known: the clean image; only its known part is used.
        mask: true where to sample; broadcasts to `known`.
        steps: number of timesteps; there are up to `jump_n_sample` times as many evaluations.
        generators: one generator per sample.
        timestep_spacing: name of the spacing, or the timesteps.
        eta: noise of the steps, from 0 (deterministic) to 1 (ancestral).
        jump_length: number of steps that are repeated together.
        jump_n_sample: number of times that each step is sampled, except those after the last jump.
        callback: `callback(evaluation, evaluations, x0)`.

    Returns:
        x0, equal to `known` bit for bit in the known part.

    Raises:
        ValueError: `jump_length` or `jump_n_sample` is below 1.
    """
    if jump_length < 1 or jump_n_sample < 1:
        raise ValueError(
            f"jump_length is {jump_length}, jump_n_sample {jump_n_sample}; both must be 1 or more"
        )
    alpha_bar = diffusion.cpu_alpha_bar.tolist()
    timesteps = diffusion.sampling_timesteps(timestep_spacing, steps)
    schedule = jump_schedule(len(timesteps), jump_length, jump_n_sample)
    evaluations = 1 + sum(j > i for i, j in pairwise(schedule))
    denoise = with_callback(denoise, callback, evaluations)

    def noised(clean: Tensor, signal: float) -> Tensor:
        noise = randn(clean.shape[1:], generators, clean.device)
        return math.sqrt(signal) * clean + math.sqrt(1 - signal) * noise

    x = torch.where(mask, x_T, noised(known, alpha_bar[timesteps[0]]))
    for i, j in pairwise(schedule):
        alpha_bar_t, alpha_bar_s = alpha_bar[timesteps[i]], alpha_bar[timesteps[j]]
        if j < i:  # back to a noisier timestep
            x = noised(x, alpha_bar_s / alpha_bar_t)
            continue
        x, std = ddim_step(denoise(x, timesteps[i]), alpha_bar_t, alpha_bar_s, eta)
        x = x + std * randn(x.shape[1:], generators, x.device)
        x = torch.where(mask, x, noised(known, alpha_bar_s))
    return torch.where(mask, denoise(x, timesteps[-1]).x0, known)


def jump_schedule(steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """Return the indices of `steps` timesteps in the order in which RePaint visits them.

    After every `jump_length` steps, RePaint goes back to the first of them, until they were
    sampled `jump_n_sample` times.
    """
    jumps_left = {i: jump_n_sample - 1 for i in range(jump_length, steps, jump_length)}
    visited = [0]
    while visited[-1] < steps - 1:
        i = visited[-1] + 1
        visited.append(i)
        if jumps_left.get(i, 0):
            jumps_left[i] -= 1
            visited.append(i - jump_length)
    return visited
