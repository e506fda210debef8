"""Diffusion: pure mathematics on tensors. It knows nothing of networks, text or training."""

from unclip.diffusion.gaussian import GaussianDiffusion, Prediction
from unclip.diffusion.guidance import guided, within
from unclip.diffusion.inpainting import inpaint
from unclip.diffusion.noise import randn
from unclip.diffusion.samplers import ddim, ddim_invert, ddpm
from unclip.diffusion.solvers import dpm_solver_pp_2m, dpm_solver_pp_2m_sde, unipc
from unclip.diffusion.timestep_density import LogitNormal

__all__ = [
    "GaussianDiffusion",
    "LogitNormal",
    "Prediction",
    "ddim",
    "ddim_invert",
    "ddpm",
    "dpm_solver_pp_2m",
    "dpm_solver_pp_2m_sde",
    "guided",
    "inpaint",
    "randn",
    "unipc",
    "within",
]
