"""The stages of a bundle joined: caption → image embedding → 64 → 256 → 1024 pixels.

Each image has its own generator in each stage, seeded by the image's seed and the stage's name, and
stages pass images on as 8-bit pixels. So a seed gives the same image in any batch, except that few
pixels may differ by one of 256 levels, because sums are rounded differently in another batch. An
upsampler starts from exactly the pixels that are returned.
"""

import hashlib
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from unclip import edits
from unclip.bundle import STAGES, stage_file, train_command
from unclip.images import to_float, to_uint8
from unclip.open_bundle import OpenBundle

Progress = Callable[[str, int, int], None]

STAGE_OF_SIZE = {64: "decoder", 256: "upsampler_256", 1024: "upsampler_1024"}
# Each choice of a prior and the stage that it needs: a sampled z_i, the linear baseline, or z_t.
PRIORS = {"diffusion": "prior", "ar": "prior_ar", "linear": "prior", "none": "clip"}


class Images(NamedTuple):
    """Generated images, on the CPU.

    Attributes:
        image_embedding: z_i that the decoder started from, float32 `B D`; None if it had none.
        images: the images by size in pixels, uint8 `B 3 size size`.
    """

    image_embedding: Tensor | None
    images: dict[int, Tensor]


class Cascade(OpenBundle):
    """An open bundle that generates and edits images.

    The methods share some arguments. `seeds`: one seed per image. `guidance_scale`: None takes the
    stage's own. `steps`: sampler steps by stage, such as `{"decoder": 16}`; the other stages take
    their own. `batch_size`: images that go through a stage together; it changes memory and time,
    not the images. `progress(stage, step, steps)`: called after each sampler step, with the steps
    of all batches counted together.

    They raise `FileNotFoundError` for a stage that the bundle lacks, with the command that trains
    it, `ValueError` for invalid arguments, and `MemoryError`, before anything is loaded, for stages
    that do not fit.
    """

    embed = edits.embed
    invert = edits.invert
    render = edits.render
    reconstruct = edits.reconstruct
    vary = edits.vary
    interpolate = edits.interpolate
    mix = edits.mix
    text_diff = edits.text_diff
    pca_reconstruct = edits.pca_reconstruct
    inpaint = edits.inpaint
    outpaint = edits.outpaint

    @property
    def size(self) -> int:
        """Pixels of the largest images that the bundle's stages make; at least the decoder's."""
        made = [size for size in STAGE_OF_SIZE if set(stages_for(size)) <= set(self.metadata)]
        return max(made, default=min(STAGE_OF_SIZE))

    def require_for(self, size: int) -> None:
        """Check that the stages for images of `size` pixels exist and fit into memory."""
        self.require("clip", *stages_for(size))

    @torch.inference_mode()
    def text_to_image(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        size: int = 1024,
        prior: str = "diffusion",
        guidance_scale: float | None = None,
        prior_guidance_scale: float | None = None,
        steps: Mapping[str, int] | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Images:
        """Generate an image of each prompt, and return the smaller sizes on the way as well.

        CLIP encodes each prompt once, for the prior and the decoder.

        Args:
            prompts: texts that are not blank; one longer than CLIP's context is truncated with a
                warning.
            seeds: one seed per prompt.
            size: 64, 256 or 1024 pixels.
            prior: one of `PRIORS`.
            guidance_scale: guidance scale of the decoder.
            prior_guidance_scale: guidance scale of the prior.
            steps: sampler steps by stage.
            batch_size: images that go through a stage together.
            progress: called after each sampler step.
        """
        self.require("clip", stage_of_prior(prior), *stages_for(size))
        run = {"seeds": seeds, "steps": steps, "batch_size": batch_size, "progress": progress}
        text = self.encode_prompts(prompts, **run)
        z = self.sample_prior(prior, text, guidance_scale=prior_guidance_scale, **run)
        return self._decode(z, text, size=size, guidance_scale=guidance_scale, **run)

    @torch.inference_mode()
    def prior(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        prior: str = "diffusion",
        guidance_scale: float | None = None,
        steps: Mapping[str, int] | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """Predict the image embedding of each prompt with one of `PRIORS`; it is on the CPU.

        "linear" and "none" do not sample: their embedding is the same for every seed.
        """
        self.require("clip", stage_of_prior(prior))
        run = {"seeds": seeds, "steps": steps, "batch_size": batch_size, "progress": progress}
        text = self.encode_prompts(prompts, **run)
        return self.sample_prior(prior, text, guidance_scale=guidance_scale, **run)

    @torch.inference_mode()
    def decode(
        self,
        image_embedding: Float[Tensor, "batch dim"] | None,
        captions: Sequence[str] | None,
        *,
        seeds: Sequence[int],
        size: int = 1024,
        guidance_scale: float | None = None,
        steps: Mapping[str, int] | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> Images:
        """Generate images from image embeddings (a prior's or those of real images) and captions.

        Either may be None, because the decoder was trained with both dropped out.
        """
        self.require_for(size)
        run = {"seeds": seeds, "steps": steps, "batch_size": batch_size, "progress": progress}
        if captions is None:
            text = self.no_text(len(seeds))
        else:
            _check_run({"caption": captions}, seeds, steps, batch_size)
            text = self.encode_text(captions, batch_size)
        return self._decode(image_embedding, text, size=size, guidance_scale=guidance_scale, **run)

    @torch.inference_mode()
    def upsample(
        self,
        images: UInt8[Tensor, "batch 3 height width"],
        *,
        seeds: Sequence[int],
        size: int = 1024,
        steps: Mapping[str, int] | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> dict[int, Tensor]:
        """Enlarge images of 64 or 256 pixels up to `size`; return all sizes, the given one too."""
        edge = images.shape[-1]
        missing = [name for name in stages_for(size) if name not in stages_for(edge)]
        self.require(*missing)
        run = {"seeds": seeds, "steps": steps, "batch_size": batch_size, "progress": progress}
        by_size = {edge: images.cpu()}
        for name in missing:
            image = self._sample(name, {"low_res": by_size[edge]}, guidance_scale=None, **run)
            edge = image.shape[-1]
            by_size[edge] = to_uint8(image)
        return by_size

    def encode_prompts(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: Mapping[str, int] | None,
        batch_size: int,
        **_: Any,
    ) -> dict[str, Tensor]:
        """Check prompts, warn about truncated ones and return CLIP's features of them."""
        if isinstance(prompts, str):
            raise ValueError("prompts is a string: give a list, even for a single prompt")
        _check_run({"caption": prompts}, seeds, steps, batch_size)
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError("a prompt is blank: describe the image")
            if rest := self.embedder.tokenizer.cut(prompt):
                warnings.warn(
                    f"a prompt is too long for this CLIP; cut off: {rest!r}", stacklevel=4
                )
        return self.encode_text(prompts, batch_size)

    def encode_text(self, captions: Sequence[str], batch_size: int) -> dict[str, Tensor]:
        """Return CLIP's features of captions."""
        starts = range(0, len(captions), batch_size)
        parts = [self.embedder.text(captions[start : start + batch_size]) for start in starts]
        return {
            name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0]._fields
        }

    def no_text(self, count: int) -> dict[str, Tensor]:
        """Return the text features of `count` missing captions: a mask without tokens."""
        shape = (count, self.embedder.context_length)
        return {"text_mask": torch.zeros(shape, dtype=torch.bool)}

    def batches(
        self,
        name: str,
        inputs: Mapping[str, Tensor],
        *,
        guidance_scale: float | None,
        steps: Mapping[str, int] | None,
        batch_size: int,
        progress: Progress | None,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
        """Yield each batch of a stage's inputs on the device, with its sampling arguments.

        Args:
            name: name of the stage.
            inputs: tensors with one row per image; uint8 images become floats in [-1, 1].
            guidance_scale: guidance scale of the stage.
            steps: sampler steps by stage.
            batch_size: rows per batch.
            progress: called after each sampler step.
            seeds: one seed per row, for the sampling argument `generators`; None leaves it out.
        """
        _check_run(inputs, seeds, steps, batch_size)
        count = len(next(iter(inputs.values())))
        starts = range(0, count, batch_size)
        for number, start in enumerate(starts):
            rows = slice(start, start + batch_size)
            batch = {key: value[rows].to(self.device) for key, value in inputs.items()}
            sampling = {
                "guidance_scale": guidance_scale,
                "steps": (steps or {}).get(name),
                "callback": _callback(progress, name, number, len(starts)),
            }
            if seeds is not None:
                sampling["generators"] = [_generator(seed, name) for seed in seeds[rows]]
            yield {key: _as_float(value) for key, value in batch.items()}, sampling

    def finish(
        self,
        image_embedding: Tensor | None,
        image: Tensor,
        *,
        guidance_scale: float | None = None,
        **run: Any,
    ) -> Images:
        """Enlarge the decoder's images; `guidance_scale` is ignored, as upsamplers have none."""
        z = None if image_embedding is None else image_embedding.float().cpu()
        return Images(z, self.upsample(to_uint8(image), **run))

    def sample_prior(self, prior: str, text: dict[str, Tensor], **run: Any) -> Tensor:
        """Predict image embeddings from the features of `encode_prompts`, as `prior` does."""
        if prior == "none":
            return text["text_embedding"].float().cpu()
        if prior != "linear":
            return self._sample(PRIORS[prior], text, **run).float()
        stage = self.stage("prior")
        if stage.linear is None:
            raise ValueError(
                f"{stage_file(self.folder, 'prior')} has no linear map: "
                f"train it again with `{train_command('prior')}`"
            )
        return torch.cat(
            [
                stage.linear(stage.condition(batch)["text_embedding"]).float().cpu()
                for batch, _ in self.batches("prior", text, **run)
            ]
        )

    def _decode(
        self, image_embedding: Tensor | None, text: dict[str, Tensor], *, size: int, **run: Any
    ) -> Images:
        inputs = dict(text)
        if image_embedding is not None:
            inputs["image_embedding"] = image_embedding.float()
        image = self._sample("decoder", inputs, **run)
        return self.finish(image_embedding, image, size=size, **run)

    def _sample(self, name: str, inputs: Mapping[str, Tensor], **run: Any) -> Tensor:
        """Sample one stage in batches; the result is on the CPU."""
        stage = self.stage(name)
        return torch.cat(
            [
                stage.sample(stage.condition(batch), **sampling).cpu()
                for batch, sampling in self.batches(name, inputs, **run)
            ]
        )


def stage_of_prior(prior: str) -> str:
    """Return the stage that a choice of `PRIORS` needs."""
    if prior not in PRIORS:
        raise ValueError(f"prior is {prior!r}; it can be {', '.join(PRIORS)}")
    return PRIORS[prior]


def stages_for(size: int) -> list[str]:
    """Return the stages that make an image of `size` pixels from an image embedding, in order."""
    if size not in STAGE_OF_SIZE:
        raise ValueError(f"size is {size}; it can be {', '.join(map(str, STAGE_OF_SIZE))}")
    return [stage for pixels, stage in STAGE_OF_SIZE.items() if pixels <= size]


def _check_run(
    inputs: Mapping[str, Sized],
    seeds: Sequence[int] | None,
    steps: Mapping[str, int] | None,
    batch_size: int,
) -> None:
    if unknown := (steps or {}).keys() - set(STAGES[1:]):
        raise ValueError(f"steps names {min(unknown)!r}; it can name {', '.join(STAGES[1:])}")
    if batch_size < 1 or (seeds is not None and not len(seeds)):
        raise ValueError("at least one seed and a batch_size of 1 or more are needed")
    for key, rows in inputs.items():
        if seeds is not None and len(rows) != len(seeds):
            raise ValueError(f"{key} has {len(rows)} rows, but there are {len(seeds)} seeds")


def _as_float(value: Tensor) -> Tensor:
    return to_float(value) if value.dtype == torch.uint8 else value


def _generator(seed: int, stage: str) -> torch.Generator:
    """Return the generator of an image in one stage; it is the same on every machine."""
    digest = hashlib.sha256(f"{operator.index(seed)} {stage}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def _callback(
    progress: Progress | None, stage: str, number: int, batches: int
) -> Callable[[int, int, Tensor], None] | None:
    """Return a sampler's callback for batch `number` of `batches`."""
    if progress is None:
        return None
    return lambda step, steps, x0: progress(stage, number * steps + step, batches * steps)
