"""`Cascade`: text to image, and edits of existing images (section 3).

An image becomes two latents: its CLIP embedding z_i, which describes its content, and the noise x_T
from which the decoder, conditioned on z_i, returns to the image, which holds everything else. Every
edit changes one or both and decodes again. No caption is used unless one is given.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Unpack, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from unclip.images import fit, open_image, open_mask, square_mask, to_tensor
from unclip.latents import evenly_spaced, normalize_weights, slerp, spherical_mean, text_difference
from unclip.sampling_run import EditOptions, Options, Run, StageOptions
from unclip.stages import DecoderStage, decoder_edits
from unclip.stages.quantization import PrincipalComponents
from unclip.text_to_image import Images, TextToImage

AnyImage = str | Path | Image.Image | Tensor
SIZE = 64  # pixels of the decoder's images
MAX_SHRINKAGE = 32  # from an image to CLIP's input; CUDA fails above a factor of about 47


class Latents(NamedTuple):
    """Images as latents of the decoder, on the CPU.

    Attributes:
        image_embedding: z_i, float32 `B D`.
        noise: x_T, float32 `B 3 64 64`.
    """

    image_embedding: Float[Tensor, "batch dim"]
    noise: Float[Tensor, "batch 3 height width"]


class Cascade(TextToImage):
    """An open bundle that generates and edits images; `Cascade.load` opens one.

    The methods take the options of `unclip.sampling_run` as keywords. In edits, `batch_size` is 1
    by default, so that an image is the same to the bit whatever is generated with it. In edits that
    invert an image, the decoder's `steps` are DDIM steps, in both directions, and `guidance_scale`
    None is 1 (no guidance), except in `vary`. The central square of an image is used.

    The methods raise `FileNotFoundError` for a stage that the bundle lacks, with the command that
    trains it, `ValueError` for invalid arguments, and `MemoryError`, before anything is loaded, for
    stages that do not fit.
    """

    def embed(self, images: Sequence[AnyImage]) -> Float[Tensor, "batch dim"]:
        """Return the CLIP embeddings of images, computed at each image's own resolution."""
        opened = [open_image(image) for image in images]
        largest = MAX_SHRINKAGE * self.embedder.image_size
        squares = [to_tensor(fit(image, min(*image.size, largest))) for image in opened]
        return torch.cat([self.embedder.image(square[None]).cpu() for square in squares])

    def clip_scores(
        self, images: Sequence[AnyImage], texts: Sequence[str]
    ) -> Float[Tensor, " batch"]:
        """Return the cosine of each image's CLIP embedding to that of its text.

        With it, the best of several samples can be kept (Ramesh et al. 2021, section 2.6).
        """
        z_t = self.embedder.text(texts).text_embedding.float().cpu()
        return F.cosine_similarity(self.embed(images), z_t)

    def invert(self, images: Sequence[AnyImage], **options: Unpack[StageOptions]) -> Latents:
        """Return the latents of images: z_i from CLIP, x_T by DDIM inversion."""
        return self._invert(images, Run(None, size=0, **{"batch_size": 1, **options}))

    def render(
        self,
        latents: Latents,
        *,
        seeds: Sequence[int],
        eta: float = 0.0,
        **options: Unpack[Options],
    ) -> Images:
        """Decode latents to images; with eta 0, unchanged latents give the inverted images."""
        run = Run(seeds, **{"batch_size": 1, **options})
        self._require_for(run)
        return self._render(latents, run, eta)

    def reconstruct(self, images: Sequence[AnyImage], **options: Unpack[EditOptions]) -> Images:
        """Invert images and decode their latents again, which shows how much the latents retain."""
        run = self._start(options, len(images))
        return self._render(self._invert(images, run), run)

    def vary(
        self, image: AnyImage, count: int = 4, *, eta: float = 0.5, **options: Unpack[EditOptions]
    ) -> Images:
        """Generate variations of an image: the same content and style (section 3.1).

        With `eta` 0, all of them are the reconstruction; the larger it is, the less of x_T is left.
        Here `guidance_scale` None is the decoder's own, in both directions, because new noise needs
        guidance.
        """
        run = self._start(options, count, count_up=True)
        if run.guidance_scale is None:
            run = replace(run, guidance_scale=self._decoder.guidance_scale)
        latents = self._invert([image], run)
        repeated = Latents(*(part.expand(count, *part.shape[1:]) for part in latents))
        return self._render(repeated, run, eta)

    def interpolate(
        self,
        first: AnyImage,
        last: AnyImage,
        frames: int = 9,
        *,
        noise: Literal["slerp", "fixed"] = "slerp",
        **options: Unpack[EditOptions],
    ) -> Images:
        """Interpolate between two images along the great circle of their z_i (section 3.2).

        There are `frames` images, both ends included. With `noise` "slerp", x_T is interpolated as
        well, so that the ends are reconstructions; with "fixed", all frames have one x_T, sampled
        with the decoder's own sampler and guidance.
        """
        weights = [[1 - fraction, fraction] for fraction in evenly_spaced(frames)]
        return self.mix([first, last], weights, noise=noise, **options)

    def mix(
        self,
        images: Sequence[AnyImage],
        weights: Sequence[Sequence[float]],
        *,
        noise: Literal["slerp", "fixed"] = "slerp",
        **options: Unpack[EditOptions],
    ) -> Images:
        """Generate an image for each row of `weights`, which has one weight per given image.

        The latents are combined by the spherical mean, which is `slerp` for two images. `noise` is
        as in `interpolate`.
        """
        if noise not in ("slerp", "fixed"):
            raise ValueError(f"noise is {noise!r}; it can be slerp, fixed")
        if not len(weights):
            raise ValueError("weights are empty: give a row for each image to generate")
        for row in weights:  # before anything is sampled
            normalize_weights(row, len(images))
        run = self._start(options, len(weights))
        if noise == "fixed":
            return self._decode(_means(self.embed(images), weights), None, run)
        latents = self._invert(images, run)
        return self._render(Latents(*(_means(part, weights) for part in latents)), run)

    def text_diff(
        self,
        image: AnyImage,
        source: str,
        target: str,
        *,
        strength: float = 0.5,
        frames: int = 6,
        **options: Unpack[EditOptions],
    ) -> Images:
        """Move an image in the direction in which a text changes from `source` to `target`.

        z_i is moved by `slerp` towards z_d = norm(z_t - z_t0), by θ from 0 to `strength` over the
        frames, and x_T stays: the frame of θ = 0 is the reconstruction (section 3.3; the paper's
        largest θ are 0.25 to 0.5). `source` may also be empty, or as general as "a photo".
        """
        fractions = evenly_spaced(frames)
        run = self._start(options, frames)
        z_t, z_t0 = self.embedder.text([target, source]).text_embedding.cpu()
        z_d = text_difference(z_t, z_t0)
        latents = self._invert([image], run)
        z = latents.image_embedding[0]
        moved = [slerp(z, z_d * z.norm(), strength * fraction) for fraction in fractions]
        noise = latents.noise.expand(frames, -1, -1, -1)
        return self._render(Latents(torch.stack(moved), noise), run)

    def pca_reconstruct(
        self,
        image: AnyImage,
        dimensions: Sequence[int],
        examples: Float[Tensor, "count dim"],
        **options: Unpack[EditOptions],
    ) -> Images:
        """Decode z_i reduced to its first principal components (section 4, figure 7).

        All images start from the same x_T, sampled with the decoder's own sampler and guidance, so
        that they differ only by z_i. A reduced z_i is scaled back to the length of z_i.

        Args:
            image: the image to reconstruct.
            dimensions: number of components kept, for each image generated.
            examples: embeddings from which the components are computed, such as a test set's.
            **options: options of the run.
        """
        run = self._start(options, len(dimensions))
        z = self.embed([image])
        components = PrincipalComponents(z.shape[1], max(dimensions))
        components.fit(examples)
        reduced = torch.cat([components.invert(components(z)[:, :count]) for count in dimensions])
        return self._decode(F.normalize(reduced, dim=-1) * z.norm(), None, run)

    def inpaint(
        self,
        image: AnyImage,
        mask: AnyImage,
        prompt: str | None = None,
        count: int = 1,
        **options: Unpack[EditOptions],
    ) -> Images:
        """Repaint the part of an image under a mask, and keep the rest to the bit.

        Args:
            image: the image. Its pixels are kept in all sizes up to its own; larger sizes are the
                upsampler's work.
            mask: white (or true) in the part to paint; resized to the image if needed.
            prompt: describes the whole image, through the prior; None keeps the content of `image`.
            count: number of images generated.
            **options: options of the run.
        """
        run = self._start(options, count, count_up=True)
        opened = open_image(image)
        return self._paint(opened, open_mask(mask, opened.size), opened, prompt, run)

    def outpaint(
        self,
        image: AnyImage,
        prompt: str | None = None,
        count: int = 1,
        *,
        margin: float = 0.25,
        **options: Unpack[EditOptions],
    ) -> Images:
        """Paint around an image: `inpaint` a larger square that has the image in its middle.

        `margin`, 0 or more, is the border as a fraction of the image's longer side; the borders at
        the shorter sides are wider.
        """
        if not 0 <= margin < math.inf:
            raise ValueError(f"margin is {margin}; it is a fraction of the longer side, 0 or more")
        run = self._start(options, count, count_up=True)
        opened = open_image(image)
        width, height = opened.size
        side = max(width, height) + 2 * round(margin * max(width, height))
        left, top = (side - width) // 2, (side - height) // 2
        # Repeating the edges outside keeps resizing from mixing other colors into the kept pixels.
        border = [(top, side - height - top), (left, side - width - left), (0, 0)]
        canvas = Image.fromarray(np.pad(np.asarray(opened), border, mode="edge"))
        marked = torch.ones(side, side, dtype=torch.bool)
        marked[top : top + height, left : left + width] = False
        return self._paint(canvas, marked, opened, prompt, run)

    def _start(self, options: EditOptions, count: int, *, count_up: bool = False) -> Run:
        """Check an edit's stages; return its run, with one seed for all images or counted up."""
        keywords = {"batch_size": 1, "seed": 0, **options}
        seed = keywords.pop("seed")
        run = Run(range(seed, seed + count) if count_up else [seed] * count, **keywords)
        self._require_for(run)
        return run

    @property
    def _decoder(self) -> DecoderStage:
        return cast(DecoderStage, self.stage("decoder"))

    def _invert(self, images: Sequence[AnyImage], run: Run) -> Latents:
        opened = [open_image(image) for image in images]
        z = self.embed(opened)
        pixels = torch.stack([to_tensor(fit(image, SIZE)) for image in opened])
        inputs = {**self._no_text(len(opened)), "image_embedding": z, "image": pixels}
        invert = partial(decoder_edits.invert, self._decoder)
        noise = self._sample("decoder", inputs, replace(run, seeds=None), invert, ["image"])
        return Latents(z, noise)

    def _render(self, latents: Latents, run: Run, eta: float = 0.0) -> Images:
        inputs = {**self._no_text(len(latents.noise)), **latents._asdict()}
        render = partial(decoder_edits.render, self._decoder, eta=eta)
        image = self._sample("decoder", inputs, run, render, ["noise"])
        return self._finish(latents.image_embedding, image, run)

    def _paint(
        self,
        canvas: Image.Image,
        marked: Bool[Tensor, "height width"],
        content: Image.Image,
        prompt: str | None,
        run: Run,
    ) -> Images:
        """Paint the marked part of a canvas; z_i is the prompt's, or without one `content`'s."""
        if not marked.any():
            raise ValueError("the mask marks no pixel: make the part to paint white")
        count = len(run.seeds or ())
        if prompt is None:
            text = self._no_text(count)
            z = self.embed([content]).expand(count, -1)
        else:
            text = self._encode_prompts([prompt] * count, run)
            z = self._sample_prior("diffusion", text, replace(run, guidance_scale=None))
        inputs = {
            **text,
            "image_embedding": z,
            "image": to_tensor(fit(canvas, SIZE)).expand(count, -1, -1, -1),
            "mask": square_mask(marked, SIZE).expand(count, -1, -1, -1),
        }
        complete = partial(decoder_edits.complete, self._decoder)
        image = self._sample("decoder", inputs, run, complete, ["image", "mask"])
        painted = self._finish(z, image, run)
        for edge, images in painted.images.items():
            if edge <= min(canvas.size):
                known = to_tensor(fit(canvas, edge))
                painted.images[edge] = torch.where(square_mask(marked, edge), images, known)
        return painted


def _means(points: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    return torch.stack([spherical_mean(points, row) for row in weights])
