"""The stages of a bundle joined: caption → image embedding → 64 → 256 → 1024 pixels.

Each image has its own generator in each stage, seeded by the image's seed and the stage's name, and
stages pass images on as 8-bit pixels. So a seed gives the same image in any batch, except that few
pixels may differ by one of 256 levels, because sums are rounded differently in another batch. An
upsampler starts from exactly the pixels that are returned.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Unpack, cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from unclip.batch import Batch
from unclip.bundle import SIZES, stage_file, train_command
from unclip.images import to_float, to_uint8
from unclip.open_bundle import OpenBundle
from unclip.sampling_run import Options, Run, StageOptions, generator
from unclip.stages import PriorStage

STAGE_OF_SIZE = {size: stage for stage, size in SIZES.items()}
# The ways to predict z_i, with the stage that each needs; "none" is z_t itself.
PRIORS = {"diffusion": "prior", "ar": "prior_ar", "linear": "prior", "none": "clip"}


class Images(NamedTuple):
    """Generated images, on the CPU.

    Attributes:
        image_embedding: z_i that the decoder started from, float32 `B D`; None if it had none.
        images: the images by size in pixels, uint8 `B 3 size size`.
    """

    image_embedding: Tensor | None
    images: dict[int, Tensor]


class TextToImage(OpenBundle):
    """An open bundle that generates images of prompts, in one call or stage by stage."""

    @property
    def size(self) -> int:
        """Pixels of the largest images that the bundle's stages make; at least the decoder's."""
        made = [size for size in STAGE_OF_SIZE if set(stages_for(size)) <= set(self.metadata)]
        return max(made, default=min(STAGE_OF_SIZE))

    def text_to_image(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        prior: str = "diffusion",
        prior_guidance_scale: float | None = None,
        **options: Unpack[Options],
    ) -> Images:
        """Generate an image of each prompt, and return the smaller sizes on the way as well.

        Args:
            prompts: texts that are not blank; one longer than CLIP's context is truncated with a
                warning. CLIP encodes each prompt once.
            seeds: one seed per prompt.
            prior: one of `PRIORS`.
            prior_guidance_scale: guidance scale of the prior; None is its own.
            **options: options of the run.
        """
        run = Run(seeds, **options)
        self.require("clip", stage_of_prior(prior), *stages_for(run.size))
        text = self._encode_prompts(prompts, run)
        z = self._sample_prior(prior, text, replace(run, guidance_scale=prior_guidance_scale))
        return self._decode(z, text, run)

    def prior(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        prior: str = "diffusion",
        **options: Unpack[StageOptions],
    ) -> Float[Tensor, "batch dim"]:
        """Predict the image embedding of each prompt with one of `PRIORS`.

        "linear" and "none" do not sample: their embedding is the same for every seed. The result is
        on the CPU.
        """
        run = Run(seeds, size=0, **options)
        self.require("clip", stage_of_prior(prior))
        return self._sample_prior(prior, self._encode_prompts(prompts, run), run)

    def decode(
        self,
        image_embedding: Float[Tensor, "batch dim"] | None,
        captions: Sequence[str] | None,
        *,
        seeds: Sequence[int],
        **options: Unpack[Options],
    ) -> Images:
        """Generate images from image embeddings (a prior's or those of real images) and captions.

        Either may be None, because the decoder was trained with both dropped out.
        """
        run = Run(seeds, **options)
        self._require_for(run)
        text = None if captions is None else self._encode_text(captions, run)
        return self._decode(image_embedding, text, run)

    def upsample(
        self,
        images: UInt8[Tensor, "batch 3 height width"],
        *,
        seeds: Sequence[int],
        **options: Unpack[Options],
    ) -> dict[int, Tensor]:
        """Enlarge images of 64 or 256 pixels up to `size`; return all sizes, the given one too."""
        run = Run(seeds, **options)
        stages = stages_for(run.size)[len(stages_for(images.shape[-1])) :]
        self.require(*stages)
        by_size = {images.shape[-1]: images.cpu()}
        for name in stages:
            images = to_uint8(self._sample(name, {"low_res": images}, run))
            by_size[images.shape[-1]] = images
        return by_size

    def _require_for(self, run: Run) -> None:
        """Check that the stages from an image embedding to images exist and fit into memory."""
        self.require("clip", *stages_for(run.size))

    def _encode_prompts(self, prompts: Sequence[str], run: Run) -> dict[str, Tensor]:
        """Check prompts, warn about truncated ones and return CLIP's features of them."""
        if isinstance(prompts, str):
            raise ValueError("prompts is a string: give a list, even for a single prompt")
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError("a prompt is blank: describe the image")
            if rest := self.embedder.tokenizer.cut(prompt):
                message = f"a prompt is too long for this CLIP; cut off: {rest!r}"
                warnings.warn(message, stacklevel=3)
        return self._encode_text(prompts, run)

    def _encode_text(self, captions: Sequence[str], run: Run) -> dict[str, Tensor]:
        """Return CLIP's features of captions."""
        run.check_rows({"caption": captions})
        starts = range(0, len(captions), run.batch_size)
        parts = [self.embedder.text(captions[start : start + run.batch_size]) for start in starts]
        return {
            name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0]._fields
        }

    def _no_text(self, count: int) -> dict[str, Tensor]:
        """Return the text features of `count` missing captions: a mask without tokens."""
        return {"text_mask": torch.zeros(count, self.embedder.context_length, dtype=torch.bool)}

    def _sample_prior(self, prior: str, text: Mapping[str, Tensor], run: Run) -> Tensor:
        """Predict image embeddings from the features of prompts, as `prior` does."""
        if prior == "none":
            return text["text_embedding"].float().cpu()
        if prior != "linear":
            return self._sample(PRIORS[prior], text, run).float()
        linear = cast(PriorStage, self.stage("prior")).linear
        if linear is None:
            fix = f"train it again with `{train_command('prior')}`"
            raise ValueError(f"{stage_file(self.folder, 'prior')} has no linear map: {fix}")

        def predict(condition: Mapping[str, Tensor], **sampling: Any) -> Tensor:
            return linear(condition["text_embedding"])

        return self._sample("prior", text, run, predict).float()

    def _decode(
        self, image_embedding: Tensor | None, text: Mapping[str, Tensor] | None, run: Run
    ) -> Images:
        inputs = dict(text or self._no_text(len(run.seeds or ())))
        if image_embedding is not None:
            inputs["image_embedding"] = image_embedding.float()
        return self._finish(image_embedding, self._sample("decoder", inputs, run), run)

    def _finish(self, image_embedding: Tensor | None, image: Tensor, run: Run) -> Images:
        """Enlarge the decoder's images, without guidance."""
        z = None if image_embedding is None else image_embedding.detach().float().cpu()
        options = {**vars(run), "guidance_scale": None}
        return Images(z, self.upsample(to_uint8(image), **options))

    @torch.inference_mode()
    def _sample(
        self,
        name: str,
        inputs: Mapping[str, Tensor],
        run: Run,
        sample: Callable[..., Tensor] | None = None,
        more: Sequence[str] = (),
    ) -> Tensor:
        """Sample one stage in batches, smaller ones if a GPU's memory is full; return on the CPU.

        Args:
            name: name of the stage.
            inputs: tensors with one row per image; uint8 images become floats in [-1, 1].
            run: seeds and options.
            sample: function to call instead of the stage's `sample`.
            more: names of the inputs that `sample` takes after the condition.
        """
        try:
            return self._sample_batches(name, inputs, run, sample, more)
        except torch.OutOfMemoryError:
            size = min(run.batch_size, len(next(iter(inputs.values()))))
            if size == 1:
                raise
        half = (size + 1) // 2
        warnings.warn(f"{name}: not enough memory; trying batches of {half}", stacklevel=2)
        return self._sample(name, inputs, replace(run, batch_size=half), sample, more)

    def _sample_batches(
        self,
        name: str,
        inputs: Mapping[str, Tensor],
        run: Run,
        sample: Callable[..., Tensor] | None,
        more: Sequence[str],
    ) -> Tensor:
        run.check_rows(inputs)
        stage, outputs = self.stage(name), []
        sample = sample or stage.sample
        starts = range(0, len(next(iter(inputs.values()))), run.batch_size)
        for number, start in enumerate(starts):
            rows = slice(start, start + run.batch_size)
            batch = {key: _as_float(value[rows].to(self.device)) for key, value in inputs.items()}
            options: dict[str, Any] = {
                "guidance_scale": run.guidance_scale,
                "steps": (run.steps or {}).get(name),
                "callback": run.callback(name, number, len(starts)),
            }
            if run.seeds is not None:
                options["generators"] = [generator(seed, name) for seed in run.seeds[rows]]
            condition = stage.condition(cast(Batch, batch))
            arguments = [batch[key] for key in more]
            outputs.append(sample(condition, *arguments, **options).cpu())
        return torch.cat(outputs)


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


def _as_float(value: Tensor) -> Tensor:
    return to_float(value) if value.dtype == torch.uint8 else value
