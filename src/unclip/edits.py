"""Edit existing images: variations, interpolation, text diffs, inpainting (section 3).

An image becomes two latents: its CLIP embedding z_i, which describes its content, and the noise x_T
from which the decoder, conditioned on z_i, returns to the image, which holds everything else. Every
edit changes one or both and decodes again. No caption is used unless one is given.

The functions are methods of `Cascade`. An image may be a path, a Pillow image or a tensor
(`unclip.images.open_image`), of any size; its central square is used. Besides the arguments of the
cascade's other methods, the functions share these:

    seed: seed of the first image; images that differ by their noise count up from it.
    guidance_scale: None is 1 (no guidance) for edits that invert an image, except `vary`.
    steps: for the decoder, DDIM steps, in both directions.
    batch_size: 1 by default, so that an image is the same to the bit whatever is generated with it;
        more is faster on a GPU.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from unclip.images import fit, open_image, open_mask, square_mask, to_tensor
from unclip.latents import normalize_weights, slerp, spherical_mean, text_difference
from unclip.stages import decoder_edits
from unclip.stages.quantization import PrincipalComponents

if TYPE_CHECKING:
    from unclip.cascade import Cascade, Images, Progress

AnyImage = str | Path | Image.Image | Tensor
SIZE = 64  # pixels of the decoder's images


class Options(TypedDict, total=False):
    """Arguments that all edits share."""

    guidance_scale: float | None
    steps: Mapping[str, int] | None
    batch_size: int
    progress: "Progress | None"


_DEFAULTS: Options = {"guidance_scale": None, "steps": None, "batch_size": 1, "progress": None}


class Latents(NamedTuple):
    """Images as latents of the decoder, on the CPU.

    Attributes:
        image_embedding: z_i, float32 `B D`.
        noise: x_T, float32 `B 3 64 64`.
    """

    image_embedding: Float[Tensor, "batch dim"]
    noise: Float[Tensor, "batch 3 height width"]


def embed(cascade: "Cascade", images: Sequence[AnyImage]) -> Float[Tensor, "batch dim"]:
    """Return the CLIP embeddings of images, computed at each image's own resolution."""
    opened = [open_image(image) for image in images]
    squares = [to_tensor(fit(image, min(image.size))) for image in opened]
    return torch.cat([cascade.embedder.image(square[None]).cpu() for square in squares])


@torch.inference_mode()
def invert(cascade: "Cascade", images: Sequence[AnyImage], **options: Unpack[Options]) -> Latents:
    """Return the latents of images: z_i from CLIP, x_T by DDIM inversion."""
    opened = [open_image(image) for image in images]
    image_embedding = cascade.embed(opened)
    inputs = {
        **cascade.no_text(len(opened)),
        "image_embedding": image_embedding,
        "image": torch.stack([to_tensor(fit(image, SIZE)) for image in opened]),
    }
    stage = cascade.stage("decoder")
    noise = [
        decoder_edits.invert(stage, stage.condition(batch), batch["image"], **sampling).cpu()
        for batch, sampling in cascade.batches("decoder", inputs, **_DEFAULTS | options)
    ]
    return Latents(image_embedding, torch.cat(noise))


@torch.inference_mode()
def render(
    cascade: "Cascade",
    latents: Latents,
    *,
    seeds: Sequence[int],
    eta: float = 0.0,
    size: int = 1024,
    **options: Unpack[Options],
) -> "Images":
    """Decode latents to images; with eta 0, unchanged latents give the inverted images."""
    options = _DEFAULTS | options
    stage = cascade.stage("decoder")
    inputs = {**cascade.no_text(len(latents.noise)), **latents._asdict()}
    image = [
        decoder_edits.render(
            stage, stage.condition(batch), batch["noise"], eta=eta, **sampling
        ).cpu()
        for batch, sampling in cascade.batches("decoder", inputs, seeds=seeds, **options)
    ]
    z = latents.image_embedding
    return cascade.finish(z, torch.cat(image), size=size, seeds=seeds, **options)


def reconstruct(
    cascade: "Cascade",
    images: Sequence[AnyImage],
    *,
    seed: int = 0,
    size: int = 1024,
    **options: Unpack[Options],
) -> "Images":
    """Invert images and decode their latents again, which shows how much the latents retain."""
    cascade.require_for(size)
    latents = cascade.invert(images, **options)
    return cascade.render(latents, seeds=[seed] * len(images), size=size, **options)


def vary(
    cascade: "Cascade",
    image: AnyImage,
    count: int = 4,
    *,
    eta: float = 0.5,
    seed: int = 0,
    size: int = 1024,
    **options: Unpack[Options],
) -> "Images":
    """Generate variations of an image: the same content and style (section 3.1).

    With `eta` 0, all of them are the reconstruction; the larger it is, the less of x_T is left.
    Here `guidance_scale` None is the decoder's own, in both directions, because new noise needs
    guidance.
    """
    cascade.require_for(size)
    if options.get("guidance_scale") is None:
        options["guidance_scale"] = cascade.stage("decoder").guidance_scale
    latents = cascade.invert([image], **options)
    repeated = Latents(*(part.expand(count, *part.shape[1:]) for part in latents))
    seeds = range(seed, seed + count)
    return cascade.render(repeated, seeds=seeds, eta=eta, size=size, **options)


def interpolate(
    cascade: "Cascade",
    first: AnyImage,
    last: AnyImage,
    frames: int = 9,
    *,
    noise: Literal["slerp", "fixed"] = "slerp",
    seed: int = 0,
    size: int = 1024,
    **options: Unpack[Options],
) -> "Images":
    """Interpolate between two images along the great circle of their z_i (section 3.2).

    Args:
        cascade: the cascade.
        first: image of the first frame.
        last: image of the last frame.
        frames: number of images generated, both ends included.
        noise: "slerp" interpolates x_T as well, so that the ends are reconstructions; "fixed"
            samples one x_T for all frames with the decoder's own sampler and guidance.
        seed: seed of all frames.
        size: size of the images in pixels.
        **options: the other shared arguments.
    """
    weights = [[1 - fraction, fraction] for fraction in _fractions(frames)]
    return cascade.mix([first, last], weights, noise=noise, seed=seed, size=size, **options)


def mix(
    cascade: "Cascade",
    images: Sequence[AnyImage],
    weights: Sequence[Sequence[float]],
    *,
    noise: Literal["slerp", "fixed"] = "slerp",
    seed: int = 0,
    size: int = 1024,
    **options: Unpack[Options],
) -> "Images":
    """Generate an image for each row of `weights`, which has one weight per given image.

    The latents are combined by the spherical mean, which is `slerp` for two images. The other
    arguments are those of `interpolate`.
    """
    if noise not in ("slerp", "fixed"):
        raise ValueError(f"noise is {noise!r}; it can be slerp, fixed")
    if not len(weights):
        raise ValueError("weights are empty: give a row for each image to generate")
    for row in weights:
        normalize_weights(row, len(images))
    cascade.require_for(size)
    seeds = [seed] * len(weights)
    if noise == "fixed":
        z = _means(cascade.embed(images), weights)
        return cascade.decode(z, None, seeds=seeds, size=size, **_DEFAULTS | options)
    latents = cascade.invert(images, **options)
    mixed = Latents(*(_means(part, weights) for part in latents))
    return cascade.render(mixed, seeds=seeds, size=size, **options)


def text_diff(
    cascade: "Cascade",
    image: AnyImage,
    source: str,
    target: str,
    *,
    strength: float = 0.5,
    frames: int = 6,
    seed: int = 0,
    size: int = 1024,
    **options: Unpack[Options],
) -> "Images":
    """Move an image in the direction in which a text changes from `source` to `target`.

    z_i is moved by `slerp` towards z_d = norm(z_t - z_t0), by θ from 0 to `strength` over the
    frames, and x_T stays: the frame of θ = 0 is the reconstruction (section 3.3; the paper uses
    0.25 to 0.5 as the largest θ). `source` may also be empty, or as general as "a photo".
    """
    cascade.require_for(size)
    z_t, z_t0 = cascade.embedder.text([target, source]).text_embedding.cpu()
    latents = cascade.invert([image], **options)
    (z,) = latents.image_embedding
    z_d = text_difference(z_t, z_t0) * z.norm()
    moved = torch.stack([slerp(z, z_d, strength * fraction) for fraction in _fractions(frames)])
    latents = Latents(moved, latents.noise.expand(frames, -1, -1, -1))
    return cascade.render(latents, seeds=[seed] * frames, size=size, **options)


def pca_reconstruct(
    cascade: "Cascade",
    image: AnyImage,
    dimensions: Sequence[int],
    examples: Float[Tensor, "count dim"],
    *,
    seed: int = 0,
    size: int = 1024,
    **options: Unpack[Options],
) -> "Images":
    """Decode z_i reduced to its first principal components (section 4, figure 7).

    All images start from the same x_T, sampled with the decoder's own sampler and guidance, so
    that they differ only by z_i. A reduced z_i is scaled back to the length of z_i.

    Args:
        cascade: the cascade.
        image: the image to reconstruct.
        dimensions: number of components kept, for each image generated.
        examples: embeddings from which the components are computed, such as those of a test set.
        seed: seed of x_T.
        size: size of the images in pixels.
        **options: the other shared arguments; `guidance_scale` None is the decoder's own.
    """
    cascade.require_for(size)
    z = cascade.embed([image])
    components = PrincipalComponents(z.shape[1], max(dimensions))
    components.fit(examples)
    reduced = torch.cat([components.invert(components(z)[:, :count]) for count in dimensions])
    reduced = torch.nn.functional.normalize(reduced, dim=-1) * z.norm()
    seeds = [seed] * len(dimensions)
    return cascade.decode(reduced, None, seeds=seeds, size=size, **_DEFAULTS | options)


def inpaint(
    cascade: "Cascade",
    image: AnyImage,
    mask: AnyImage,
    prompt: str | None = None,
    count: int = 1,
    *,
    seed: int = 0,
    size: int = 1024,
    **options: Unpack[Options],
) -> "Images":
    """Repaint the part of an image under a mask, and keep the rest to the bit.

    Args:
        cascade: the cascade.
        image: the image. Its pixels are kept in all sizes up to its own; larger sizes are the
            upsampler's work.
        mask: white (or true) in the part to paint; resized to the image if needed.
        prompt: describes the whole image, through the prior; None keeps the content of `image`.
        count: number of images generated.
        seed: seed of the first image.
        size: size of the images in pixels.
        **options: the other shared arguments; `guidance_scale` None is the decoder's own.
    """
    cascade.require_for(size)
    opened = open_image(image)
    marked, seeds = open_mask(mask, opened.size), range(seed, seed + count)
    return _paint(cascade, opened, marked, opened, prompt, seeds, size, options)


def outpaint(
    cascade: "Cascade",
    image: AnyImage,
    prompt: str | None = None,
    count: int = 1,
    *,
    margin: float = 0.25,
    seed: int = 0,
    size: int = 1024,
    **options: Unpack[Options],
) -> "Images":
    """Paint around an image: `inpaint` a larger square that has the image in its middle.

    `margin`, 0 or more, is the border as a fraction of the image's longer side; the borders at the
    shorter sides are wider.
    """
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin is {margin}; it is a fraction of the longer side, 0 or more")
    cascade.require_for(size)
    opened = open_image(image)
    width, height = opened.size
    side = max(width, height) + 2 * round(margin * max(width, height))
    left, top = (side - width) // 2, (side - height) // 2
    # Repeating the edges outside keeps resizing from mixing other colors into the kept pixels.
    border = [(top, side - height - top), (left, side - width - left), (0, 0)]
    canvas = Image.fromarray(np.pad(np.asarray(opened), border, mode="edge"))
    marked = torch.ones(side, side, dtype=torch.bool)
    marked[top : top + height, left : left + width] = False
    seeds = range(seed, seed + count)
    return _paint(cascade, canvas, marked, opened, prompt, seeds, size, options)


@torch.inference_mode()
def _paint(
    cascade: "Cascade",
    canvas: Image.Image,
    marked: Bool[Tensor, "height width"],
    content: Image.Image,
    prompt: str | None,
    seeds: Sequence[int],
    size: int,
    options: Options,
) -> "Images":
    """Paint the marked part of a canvas; z_i is the prompt's, or without one `content`'s."""
    if not marked.any():
        raise ValueError("the mask marks no pixel: make the part to paint white")
    run, count = {**_DEFAULTS, **options, "seeds": seeds}, len(seeds)
    if prompt is None:
        text = cascade.no_text(count)
        z = cascade.embed([content]).expand(count, -1)
    else:
        text = cascade.encode_prompts([prompt] * count, **run)
        z = cascade.sample_prior("diffusion", text, **{**run, "guidance_scale": None})
    inputs = {
        **text,
        "image_embedding": z,
        "image": to_tensor(fit(canvas, SIZE)).expand(count, -1, -1, -1),
        "mask": square_mask(marked, SIZE).expand(count, -1, -1, -1),
    }
    stage = cascade.stage("decoder")
    image = [
        decoder_edits.complete(
            stage, stage.condition(batch), batch["image"], batch["mask"], **sampling
        ).cpu()
        for batch, sampling in cascade.batches("decoder", inputs, **run)
    ]
    painted = cascade.finish(z, torch.cat(image), size=size, **run)
    for edge, images in painted.images.items():
        if edge <= min(canvas.size):
            known = to_tensor(fit(canvas, edge))
            painted.images[edge] = torch.where(square_mask(marked, edge), images, known)
    return painted


def _fractions(frames: int) -> list[float]:
    """Return evenly spaced numbers from 0 to 1, both included; a single one is 1."""
    if frames < 1:
        raise ValueError(f"frames is {frames}; at least 1 is needed")
    return [1.0] if frames == 1 else [place / (frames - 1) for place in range(frames)]


def _means(points: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """Return the weighted mean on the sphere for each row of weights.

    A point that has all the weight is kept to the bit.
    """
    if len(points) == 2:
        return torch.stack([slerp(*points, normalize_weights(row, 2)[1].item()) for row in weights])
    return torch.stack([spherical_mean(points, row) for row in weights])
