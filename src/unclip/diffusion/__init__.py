"""Diffusion: pure mathematics on tensors. It knows nothing of networks, text or training."""

from unclip.diffusion.gaussian import GaussianDiffusion, Prediction
from unclip.diffusion.guidance import guided
from unclip.diffusion.noise import randn
from unclip.diffusion.samplers import ddim, ddpm, dpm_solver_pp_2m

__all__ = [
    "GaussianDiffusion",
    "Prediction",
    "ddim",
    "ddpm",
    "dpm_solver_pp_2m",
    "guided",
    "randn",
]
