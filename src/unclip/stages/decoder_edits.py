"""Edit images with the decoder: DDIM inversion, reconstruction and inpainting (section 3).

Inversion and reconstruction use DDIM with the same denoiser and timesteps, whatever sampler the
stage has. These timesteps end above 0: near 0, inversion turns details that the network cannot
predict into noise of many times the scale of the true noise. Steps near 0 would reconstruct an
image slightly more exactly, but the result would no longer follow its embedding (measured in the
paper's inversion figure). `steps` of None is `STEPS`; a guidance scale of None is `GUIDANCE_SCALE`
for DDIM, and the stage's own for inpainting.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unclip.diffusion import GaussianDiffusion, ddim, ddim_invert, inpaint
from unclip.diffusion.samplers import Callback, Denoise
from unclip.stages.decoder import DecoderStage

STEPS = 25
ITERATIONS = 2
LOWEST = 0.1  # the last timestep, as a share of T
GUIDANCE_SCALE = 1.0  # with guidance, a DDIM step does not undo the step of the inversion


def timesteps(diffusion: GaussianDiffusion, steps: int) -> list[int]:
    """Return timesteps evenly spaced from T-1 to a tenth of T.

    Raises:
        ValueError: there are fewer timesteps than steps.
    """
    last = diffusion.timesteps - 1
    lowest = round(LOWEST * last)
    if steps > last - lowest + 1:
        raise ValueError(f"steps of the decoder is {steps}; it can be 1 to {last - lowest + 1}")
    return [round(last - (last - lowest) * k / max(steps - 1, 1)) for k in range(steps)]


@torch.no_grad()
def invert(
    stage: DecoderStage,
    condition: dict[str, Tensor],
    image: Float[Tensor, "batch 3 height width"],
    *,
    guidance_scale: float | None = None,
    steps: int | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """Return the noise x_T that reconstructs `image`, of the decoder's size (section 3.1).

    The callback is called as `callback(evaluation, evaluations, x0)`.
    """
    denoise, spacing = _ddim_run(stage, condition, guidance_scale, steps)
    options = {"iterations": ITERATIONS, "callback": callback, **spacing}
    return ddim_invert(denoise, image, stage.diffusion, **options)


@torch.no_grad()
def render(
    stage: DecoderStage,
    condition: dict[str, Tensor],
    noise: Float[Tensor, "batch 3 height width"],
    *,
    generators: Sequence[torch.Generator],
    eta: float = 0.0,
    guidance_scale: float | None = None,
    steps: int | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """Sample images in [-1, 1] from given noise x_T by DDIM; eta = 0 reverses `invert`.

    The generators give the fresh noise, whose share eta is from 0 (the result depends only on
    `noise`) to 1.
    """
    denoise, spacing = _ddim_run(stage, condition, guidance_scale, steps)
    options = {"generators": generators, "eta": eta, "callback": callback, **spacing}
    return ddim(denoise, noise, stage.diffusion, **options)


def _ddim_run(
    stage: DecoderStage, condition: dict[str, Tensor], scale: float | None, steps: int | None
) -> tuple[Denoise, dict[str, Any]]:
    """Return the denoiser of inversion and reconstruction, and their timesteps."""
    steps = STEPS if steps is None else steps
    denoise = stage.denoiser(condition, GUIDANCE_SCALE if scale is None else scale)
    return denoise, {"steps": steps, "timestep_spacing": timesteps(stage.diffusion, steps)}


@torch.no_grad()
def complete(
    stage: DecoderStage,
    condition: dict[str, Tensor],
    image: Float[Tensor, "batch 3 height width"],
    mask: Bool[Tensor, "batch 1 height width"],
    *,
    generators: Sequence[torch.Generator],
    guidance_scale: float | None = None,
    steps: int | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "batch 3 height width"]:
    """Inpaint `image`, of the decoder's size, where `mask` is true; the rest stays bit for bit."""
    return inpaint(
        stage.denoiser(condition, guidance_scale),
        stage.noise(condition, generators),
        stage.diffusion,
        known=image,
        mask=mask,
        steps=STEPS if steps is None else steps,
        generators=generators,
        callback=callback,
    )
