"""What the decoder does with a picture that exists: finds its noise, returns from it, completes it.

Both ways of a reconstruction take the same denoiser and the same timesteps, whatever sampler the
decoder draws with. These timesteps end above 0. Near 0, what a network cannot draw is taken for
noise of many times the noise's own size; with it in x_T a picture returns a little more exactly,
but no longer follows its embedding (measured: `evaluate.py measure=paper only=[inversion]`).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unclip.diffusion import GaussianDiffusion, ddim, ddim_invert, inpaint, randn
from unclip.diffusion.samplers import Callback, Denoise
from unclip.stages.decoder import CHANNELS, DecoderStage

STEPS = 25
ITERATIONS = 2
LOWEST = 0.1  # the last timestep, of all
GUIDANCE_SCALE = 1.0  # guided, a step back is far from the step that it shall undo


def timesteps(diffusion: GaussianDiffusion, steps: int) -> list[int]:
    """Evenly from T-1 down to a tenth of T.

    Raises:
        ValueError: for more steps than there are timesteps.
    """
    last = diffusion.timesteps - 1
    lowest = round(LOWEST * last)
    if steps > last - lowest + 1:
        raise ValueError(f"{steps} steps of the decoder: there are {last - lowest + 1} timesteps")
    return [round(last - (last - lowest) * k / max(steps - 1, 1)) for k in range(steps)]


def _denoiser(
    stage: DecoderStage, condition: dict[str, Tensor], guidance_scale: float | None
) -> Denoise:
    network = stage.guided(condition, guidance_scale)
    return stage.diffusion.denoiser(network, 1.0, stage.threshold_percentile)


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
    """The noise x_T that leads to `image` under a condition (section 3.1).

    Args:
        stage: the decoder.
        condition: of `stage.condition`.
        image: pixels in [-1, 1], of the decoder's size.
        guidance_scale: None is `GUIDANCE_SCALE`.
        steps: of DDIM; None is `STEPS`.
        callback: called after each evaluation of the network.
    """
    steps = STEPS if steps is None else steps
    return ddim_invert(
        _denoiser(stage, condition, GUIDANCE_SCALE if guidance_scale is None else guidance_scale),
        image,
        stage.diffusion,
        steps=steps,
        spacing=timesteps(stage.diffusion, steps),
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
    """Images in [-1, 1] from given noise: with eta 0 the way back from `invert`.

    Args:
        stage: the decoder.
        condition: of `stage.condition`.
        noise: x_T.
        generators: of the noise that eta adds, one an image.
        eta: from 0, where the noise decides about everything, to 1.
        guidance_scale: as of `invert`.
        steps: as of `invert`.
        callback: called after each evaluation of the network.
    """
    steps = STEPS if steps is None else steps
    return ddim(
        _denoiser(stage, condition, GUIDANCE_SCALE if guidance_scale is None else guidance_scale),
        noise,
        stage.diffusion,
        steps=steps,
        spacing=timesteps(stage.diffusion, steps),
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
    """`image` with what lies under the mask painted anew; the rest to the bit.

    Args:
        stage: the decoder.
        condition: of `stage.condition`.
        image: pixels in [-1, 1], of the decoder's size.
        mask: true where to paint.
        generators: one an image.
        guidance_scale: None is the stage's own.
        steps: of DDIM; None is `STEPS`.
        callback: called after each evaluation of the network.
    """
    noise = randn((CHANNELS, stage.image_size, stage.image_size), generators, image.device)
    return inpaint(
        _denoiser(stage, condition, guidance_scale),
        noise,
        stage.diffusion,
        known=image,
        mask=mask,
        steps=STEPS if steps is None else steps,
        generators=generators,
        callback=callback,
    )
