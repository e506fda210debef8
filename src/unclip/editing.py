"""Pictures that exist, varied, joined, moved towards a text and completed (section 3).

A picture becomes two latents: its CLIP embedding z_i, which says what is in it, and the noise x_T
from which the decoder, told z_i, returns to it, which holds all that z_i leaves open. Every edit
moves one or both and decodes again. No caption takes part unless one is given.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from unclip.clip import ClipEmbedder
from unclip.images import fit, open_image, open_mask, square_mask, to_tensor
from unclip.latents import blend, shares, slerp, text_difference
from unclip.stages.decoder_edits import complete, invert, render
from unclip.stages.quantization import PrincipalComponents

Picture = str | Path | Image.Image | Tensor
Progress = Callable[[str, int, int], None]
SIZE = 64  # of the decoder
_ONE = {"guidance_scale": None, "steps": None, "batch_size": 1, "progress": None}


class How(TypedDict, total=False):
    """The arguments that all edits share."""

    guidance_scale: float | None
    steps: Mapping[str, int] | None
    batch_size: int
    progress: Progress | None


class Latents(NamedTuple):
    """Pictures as the decoder knows them, on the CPU.

    Attributes:
        image_embedding: z_i, float32 `B D`.
        noise: x_T, float32 `B 3 64 64`.
    """

    image_embedding: Float[Tensor, "batch dim"]
    noise: Float[Tensor, "batch 3 height width"]


class Pictures(NamedTuple):
    """What the cascade made, on the CPU.

    Attributes:
        image_embedding: what the decoder started from, float32 `B D`; None where that was nothing.
        images: for each size in pixels, uint8 `B 3 size size`.
    """

    image_embedding: Tensor | None
    images: dict[int, Tensor]


class Editing:
    """The edits of a `Cascade`, which inherits them.

    A picture may be a path, one of Pillow's or a tensor (`unclip.images.open_image`), of
    any size: what is not square is cropped to its middle. Beside the cascade's own, the methods
    share these arguments. `seed`: of the first picture made; where several differ by chance, the
    others count up. `guidance_scale`: None is 1, without guidance, wherever the way back to a
    picture has to be found. `steps`: for the decoder, DDIM's, there and back. `batch_size`: 1, so
    that a picture is the same to the bit in whichever sequence it stands; more is faster on a GPU.
    """

    embedder: ClipEmbedder
    prior: Callable[..., Tensor]
    decode: Callable[..., Pictures]
    stage: Callable[[str], Any]
    _sample: Callable[..., Tensor]
    _finish: Callable[..., Pictures]
    _require_for: Callable[[int], None]

    def embed(self, images: Sequence[Picture]) -> Float[Tensor, "batch dim"]:
        """The CLIP embeddings of pictures, each seen as large as it is."""
        pictures = [open_image(image) for image in images]
        squares = [to_tensor(fit(picture, min(picture.size))) for picture in pictures]
        return torch.cat([self.embedder.image(square[None]).cpu() for square in squares])

    @torch.inference_mode()
    def invert(
        self,
        images: Sequence[Picture],
        **how: Unpack[How],
    ) -> Latents:
        """The latents of pictures: z_i from CLIP, x_T by DDIM inversion."""
        pictures = [open_image(image) for image in images]
        image_embedding = self.embed(pictures)
        small = torch.stack([to_tensor(fit(picture, SIZE)) for picture in pictures])
        noise = self._sample(
            "decoder",
            {"image_embedding": image_embedding, "image": small},
            seeds=[0] * len(pictures),  # nothing is drawn
            work=lambda *given, generators, **rest: invert(*given, **rest),
            **_ONE | how,
        )
        return Latents(image_embedding, noise)

    @torch.inference_mode()
    def render(
        self,
        latents: Latents,
        *,
        seeds: Sequence[int],
        eta: float = 0.0,
        size: int = 1024,
        **how: Unpack[How],
    ) -> Pictures:
        """Pictures of latents; with eta 0 and unchanged latents those that they are from."""
        how = _ONE | how
        work = partial(render, eta=eta)
        image = self._sample("decoder", latents._asdict(), seeds=seeds, work=work, **how)
        return self._finish(latents.image_embedding, image, size=size, seeds=seeds, **how)

    def reconstruct(
        self,
        images: Sequence[Picture],
        *,
        seed: int = 0,
        size: int = 1024,
        **how: Unpack[How],
    ) -> Pictures:
        """Pictures through their latents and back: what the decoder can say of them at all."""
        self._require_for(size)
        latents = self.invert(images, **how)
        return self.render(latents, seeds=[seed] * len(images), size=size, **how)

    def vary(
        self,
        image: Picture,
        count: int = 4,
        *,
        eta: float = 0.5,
        seed: int = 0,
        size: int = 1024,
        **how: Unpack[How],
    ) -> Pictures:
        """Other pictures of the same content and style (section 3.1).

        With `eta` 0 all are the reconstruction; the more, the less of x_T is left. Here
        `guidance_scale` None is the decoder's own, both ways: what is drawn anew wants guidance.
        """
        self._require_for(size)
        if how.get("guidance_scale") is None:
            how["guidance_scale"] = self.stage("decoder").guidance_scale
        latents = _repeat(self.invert([image], **how), count)
        seeds = range(seed, seed + count)
        return self.render(latents, seeds=seeds, eta=eta, size=size, **how)

    def interpolate(
        self,
        first: Picture,
        last: Picture,
        frames: int = 9,
        *,
        noise: Literal["slerp", "fixed"] = "slerp",
        seed: int = 0,
        size: int = 1024,
        **how: Unpack[How],
    ) -> Pictures:
        """The way from one picture to another along the great circle of their z_i (section 3.2).

        Args:
            first: where it begins.
            last: where it ends.
            frames: pictures made, both ends included.
            noise: "slerp" goes from one's x_T to the other's, so that the ends are reconstructions;
                "fixed" draws one x_T for all, by `seed`, with the decoder's own sampler and scale.
            seed: of all frames.
            size: in pixels.
            **how: the other shared arguments.
        """
        weights = [[1 - at, at] for at in _even(frames)]
        return self.mix([first, last], weights, noise=noise, seed=seed, size=size, **how)

    def mix(
        self,
        images: Sequence[Picture],
        weights: Sequence[Sequence[float]],
        *,
        noise: Literal["slerp", "fixed"] = "slerp",
        seed: int = 0,
        size: int = 1024,
        **how: Unpack[How],
    ) -> Pictures:
        """A picture for each row of `weights`, which weighs each of the images.

        What lies between is the mean on the sphere, of two the point of `slerp`; the other
        arguments are those of `interpolate`.
        """
        if noise not in ("slerp", "fixed"):
            raise ValueError(f"noise is {noise!r}; it can be slerp, fixed")
        if not len(weights):
            raise ValueError("weights are empty: give a row for each picture that is to be made")
        for row in weights:
            shares(row, len(images))
        self._require_for(size)
        seeds = [seed] * len(weights)
        if noise == "fixed":
            z = _blends(self.embed(images), weights)
            return self.decode(z, None, seeds=seeds, size=size, **_ONE | how)
        latents = self.invert(images, **how)
        mixed = Latents(*(_blends(part, weights) for part in latents))
        return self.render(mixed, seeds=seeds, size=size, **how)

    def text_diff(
        self,
        image: Picture,
        source: str,
        target: str,
        *,
        strength: float = 0.5,
        frames: int = 6,
        seed: int = 0,
        size: int = 1024,
        **how: Unpack[How],
    ) -> Pictures:
        """A picture moved as a text moves from `source` to `target` (section 3.3).

        z_i goes by `slerp` towards z_d = norm(z_t - z_t0), by θ from 0 to `strength` over the
        frames, while x_T stays: the frame of θ = 0 is the reconstruction. The paper goes up to 0.25
        to 0.5. `source` may also be empty, or no more than "a photo".
        """
        self._require_for(size)
        to, since = self.embedder.text([target, source]).text_embedding.cpu()
        latents = self.invert([image], **how)
        (z,) = latents.image_embedding
        towards = text_difference(to, since) * z.norm()
        moved = [slerp(z, towards, strength * at) for at in _even(frames)]
        moved = Latents(torch.stack(moved), latents.noise.expand(frames, -1, -1, -1))
        return self.render(moved, seeds=[seed] * frames, size=size, **how)

    def pca_reconstruct(
        self,
        image: Picture,
        dimensions: Sequence[int],
        examples: Float[Tensor, "count dim"],
        *,
        seed: int = 0,
        size: int = 1024,
        **how: Unpack[How],
    ) -> Pictures:
        """Pictures of z_i cut to its first principal components (section 4, figure 7).

        All start from the same x_T, drawn by `seed` with the decoder's own sampler and scale, so
        that they differ by what z_i tells. What is left of z_i is brought back to its length.

        Args:
            image: the picture.
            dimensions: how many components are kept, for each picture made.
            examples: embeddings that the components are those of, such as a test set's.
            seed: of x_T.
            size: in pixels.
            **how: the other shared arguments; `guidance_scale` None is the decoder's own.
        """
        self._require_for(size)
        z = self.embed([image])
        components = PrincipalComponents(z.shape[1], max(dimensions))
        components.fit(examples)
        kept = [components.invert(components(z)[:, :count]) for count in dimensions]
        kept = torch.nn.functional.normalize(torch.cat(kept), dim=-1) * z.norm()
        return self.decode(kept, None, seeds=[seed] * len(dimensions), size=size, **_ONE | how)

    def inpaint(
        self,
        image: Picture,
        mask: Picture,
        prompt: str | None = None,
        count: int = 1,
        *,
        seed: int = 0,
        size: int = 1024,
        **how: Unpack[How],
    ) -> Pictures:
        """A picture with what lies under a mask painted anew, the rest kept to the bit.

        Args:
            image: the picture. Its own pixels are kept in all sizes up to its own; in larger ones
                there is the upsampler's work.
            mask: white or true where to paint; resized to the picture if it must be.
            prompt: what the whole shall show, through the prior; None is what `image` shows.
            count: pictures made.
            seed: of the first.
            size: in pixels.
            **how: the other shared arguments; `guidance_scale` None is the decoder's own.
        """
        self._require_for(size)
        picture = open_image(image)
        marked = open_mask(mask, picture.size)
        z = self._imagined(picture, prompt, range(seed, seed + count), how)
        return self._complete(picture, marked, z, prompt, range(seed, seed + count), size, how)

    def outpaint(
        self,
        image: Picture,
        prompt: str | None = None,
        count: int = 1,
        *,
        margin: float = 0.25,
        seed: int = 0,
        size: int = 1024,
        **how: Unpack[How],
    ) -> Pictures:
        """A picture with painted surroundings: `inpaint` of a square that it is the middle of.

        `margin`, 0 or more, is the border as a share of the picture's longer side; the shorter
        sides get more.
        """
        if not 0 <= margin < math.inf:
            raise ValueError(f"margin is {margin}; it is a share of the longer side, 0 or more")
        self._require_for(size)
        picture = open_image(image)
        width, height = picture.size
        side = max(width, height) + 2 * round(margin * max(width, height))
        at = ((side - width) // 2, (side - height) // 2)
        # Its edges go on outside, so that resizing mixes nothing foreign into what is kept.
        border = [(at[1], side - height - at[1]), (at[0], side - width - at[0]), (0, 0)]
        canvas = Image.fromarray(np.pad(np.asarray(picture), border, mode="edge"))
        marked = torch.ones(side, side, dtype=torch.bool)
        marked[at[1] : at[1] + height, at[0] : at[0] + width] = False
        z = self._imagined(picture, prompt, range(seed, seed + count), how)
        return self._complete(canvas, marked, z, prompt, range(seed, seed + count), size, how)

    def _imagined(
        self, picture: Image.Image, prompt: str | None, seeds: Sequence[int], how: How
    ) -> Tensor:
        """z_i of what a completed picture shall show."""
        if prompt is None:
            return self.embed([picture]).expand(len(seeds), -1)
        how = {**_ONE, **how, "guidance_scale": None}
        return self.prior([prompt] * len(seeds), seeds=seeds, **how)

    @torch.inference_mode()
    def _complete(
        self,
        picture: Image.Image,
        marked: Bool[Tensor, "height width"],
        image_embedding: Float[Tensor, "batch dim"],
        prompt: str | None,
        seeds: Sequence[int],
        size: int,
        how: How,
    ) -> Pictures:
        if not marked.any():
            raise ValueError("the mask marks no pixel: make white what shall be painted")
        rows = (len(seeds), -1, -1, -1)
        inputs = {
            "image_embedding": image_embedding,
            "image": to_tensor(fit(picture, SIZE)).expand(rows),
            "mask": square_mask(marked, SIZE).expand(rows),
        }
        if prompt is not None:
            inputs["caption"] = [prompt] * len(seeds)
        how = _ONE | how
        image = self._sample("decoder", inputs, seeds=seeds, work=complete, **how)
        made = self._finish(image_embedding, image, size=size, seeds=seeds, **how)
        for edge, images in made.images.items():
            if edge <= min(picture.size):
                known = to_tensor(fit(picture, edge))
                made.images[edge] = torch.where(square_mask(marked, edge), images, known)
        return made


def _even(frames: int) -> list[float]:
    """From 0 to 1, both included; a single one is 1."""
    if frames < 1:
        raise ValueError(f"frames is {frames}; at least 1 is needed")
    return [1.0] if frames == 1 else [place / (frames - 1) for place in range(frames)]


def _repeat(latents: Latents, count: int) -> Latents:
    return Latents(*(part.expand(count, *part.shape[1:]) for part in latents))


def _blends(points: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """A point for each row of weights; what weighs all is kept to the bit."""
    if len(points) == 2:
        return torch.stack([slerp(*points, shares(row, 2)[1].item()) for row in weights])
    return torch.stack([blend(points, row) for row in weights])
