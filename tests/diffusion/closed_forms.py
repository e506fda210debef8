"""Data whose optimal denoiser E[x0 | x_t] has a closed form."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from unclip.diffusion import GaussianDiffusion
from unclip.diffusion.gaussian import Prediction

MEAN, STD = 0.7, 0.4  # the normal data
MIXTURE = ((0.3, -0.8, 0.1), (0.7, 0.5, 0.2))  # weight, mean and std of two normals
CORRELATION = 0.9  # of pairs of standard normal numbers


def predictor(diffusion: GaussianDiffusion, x0_of: Callable[[Tensor, float], Tensor]):
    """Return `denoise(x_t, t)` from a function of x_t and ᾱ_t that returns x0."""

    def denoise(x_t: Tensor, t: int) -> Prediction:
        alpha_bar = diffusion.alpha_bar[t].item()
        x0 = x0_of(x_t, alpha_bar)
        return Prediction(x0, (x_t - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar), None)

    return denoise


def normal_denoiser(diffusion: GaussianDiffusion):
    def x0_of(x_t: Tensor, alpha_bar: float) -> Tensor:
        gain = math.sqrt(alpha_bar) * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)
        return MEAN + gain * (x_t - math.sqrt(alpha_bar) * MEAN)

    return predictor(diffusion, x0_of)


def mixture_denoiser(diffusion: GaussianDiffusion):
    """Weight the normals' denoisers by their likelihoods of x_t."""

    def x0_of(x_t: Tensor, alpha_bar: float) -> Tensor:
        likelihoods, means = [], []
        for weight, mean, std in MIXTURE:
            variance = alpha_bar * std**2 + 1 - alpha_bar
            off = x_t.double() - math.sqrt(alpha_bar) * mean
            likelihoods.append(weight / math.sqrt(variance) * torch.exp(-(off**2) / (2 * variance)))
            means.append(mean + math.sqrt(alpha_bar) * std**2 / variance * off)
        total = sum(p * m for p, m in zip(likelihoods, means, strict=True))
        return (total / sum(likelihoods)).float()

    return predictor(diffusion, x0_of)


def pair_denoiser(diffusion: GaussianDiffusion):
    covariance = torch.tensor([[1, CORRELATION], [CORRELATION, 1]])

    def x0_of(x_t: Tensor, alpha_bar: float) -> Tensor:
        noisy = alpha_bar * covariance + (1 - alpha_bar) * torch.eye(2)
        return x_t @ (math.sqrt(alpha_bar) * covariance @ torch.linalg.inv(noisy)).T

    return predictor(diffusion, x0_of)


def pure_noise_diffusion() -> GaussianDiffusion:
    """Return a process whose last timestep is pure noise, ᾱ = 0."""
    diffusion = GaussianDiffusion(schedule="linear", prediction="v")
    diffusion.alpha_bar[-1] = 0.0
    return diffusion
