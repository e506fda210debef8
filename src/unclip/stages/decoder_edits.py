"""Edit images with the decoder: DDIM inversion, reconstruction and inpainting (section 3).

Inversion and reconstruction use DDIM with the same denoiser and timesteps, whatever sampler the
stage has. These timesteps end above 0: near 0, inversion turns details that the network cannot
predict into noise of many times the scale of the true noise. Steps near 0 would reconstruct an
image slightly more exactly, but the result would no longer follow its embedding (measured in the
paper's inversion figure).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unclip.diffusion import GaussianDiffusion, ddim, ddim_invert, inpaint
from unclip.diffusion.samplers import Callback
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
    """Return the noise x_T that reconstructs `image` under a condition (section 3.1).

    Args:
        stage: the decoder.
        condition: result of `stage.condition`.
        image: pixels in [-1, 1], of the decoder's size.
        guidance_scale: guidance scale; None is `GUIDANCE_SCALE`.
        steps: number of DDIM steps; None is `STEPS`.
        callback: `callback(evaluation, evaluations, x0)`.
    """
    steps = STEPS if steps is None else steps
    return ddim_invert(
        stage.denoiser(condition, GUIDANCE_SCALE if guidance_scale is None else guidance_scale),
        image,
        stage.diffusion,
        steps=steps,
        timestep_spacing=timesteps(stage.diffusion, steps),
        iterations=ITERATIONS,
        callback=callback,
    )


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
    """Sample images in [-1, 1] from given noise by DDIM; eta = 0 reverses `invert`.

    Args:
        stage: the decoder.
        condition: result of `stage.condition`.
        noise: the noise x_T, such as the result of `invert`.
        generators: generator of each image's fresh noise, used when eta > 0.
        eta: share of fresh noise, from 0 (the result depends only on `noise`) to 1.
        guidance_scale: guidance scale; None is `GUIDANCE_SCALE`.
        steps: number of DDIM steps; None is `STEPS`.
        callback: `callback(step, steps, x0)`.
    """
    steps = STEPS if steps is None else steps
    return ddim(
        stage.denoiser(condition, GUIDANCE_SCALE if guidance_scale is None else guidance_scale),
        noise,
        stage.diffusion,
        steps=steps,
        timestep_spacing=timesteps(stage.diffusion, steps),
        generators=generators,
        eta=eta,
        callback=callback,
    )


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
    """Inpaint the masked part of `image`; the rest stays bit for bit.

    Args:
        stage: the decoder.
        condition: result of `stage.condition`.
        image: pixels in [-1, 1], of the decoder's size.
        mask: true where to inpaint.
        generators: one generator per image.
        guidance_scale: guidance scale; None is the stage's own.
        steps: number of DDIM steps; None is `STEPS`.
        callback: `callback(evaluation, evaluations, x0)`.
    """
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
