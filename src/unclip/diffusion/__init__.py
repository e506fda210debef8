"""Diffusion: pure math on tensors, independent of networks, text and training."""

from unclip.diffusion.gaussian import GaussianDiffusion, Prediction
from unclip.diffusion.guidance import guided
from unclip.diffusion.inpainting import inpaint
from unclip.diffusion.samplers import ddim, ddim_invert, ddpm, randn
from unclip.diffusion.schedule import LogitNormal
from unclip.diffusion.solvers import dpm_solver_pp_2m, dpm_solver_pp_2m_sde, unipc

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
]
