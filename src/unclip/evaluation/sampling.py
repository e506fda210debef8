"""Samples of an evaluation: one seed per image, one progress bar per call."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from unclip.cascade import Cascade
from unclip.text_to_image import stage_of_prior


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How images are sampled.

    Args:
        prior: where image embeddings come from: "diffusion", "ar", "linear" or "none" (z_t itself).
        guidance_scale: guidance scale of the decoder; None is the stage's own.
        prior_guidance_scale: guidance scale of the prior; None is the stage's own.
        steps: sampler steps of stages by name; None, and the others, use the stage's own.
        batch_size: number of 64 px images per batch; larger images use smaller batches.
        seed: image k has the seed `seed` + k.
        progress: show progress bars.
    """

    prior: str = "diffusion"
    guidance_scale: float | None = None
    prior_guidance_scale: float | None = None
    steps: Mapping[str, int | None] = field(default_factory=dict)
    batch_size: int = 50
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        stage_of_prior(self.prior)
        given = {stage: count for stage, count in self.steps.items() if count is not None}
        object.__setattr__(self, "steps", given)

    def quiet(self) -> "Settings":
        """Return the same settings without progress bars."""
        return replace(self, progress=False)


class Sampling:
    """A cascade with settings; row k of a call has the seed `settings.seed` + `first` + k.

    Args:
        settings: prior, guidance, steps, batch size and seed.
        cascade: the bundle's stages.
    """

    def __init__(self, settings: Settings, cascade: Cascade) -> None:
        self.settings = settings
        self.cascade = cascade

    def predict(
        self, captions: Sequence[str], *, first: int = 0, prior: str | None = None
    ) -> Float[Tensor, "batch dim"]:
        """Predict image embeddings of captions.

        Args:
            captions: the captions.
            first: offset of the seeds.
            prior: one of `Cascade.prior`'s choices; None is that of the settings.
        """
        scale = self.settings.prior_guidance_scale
        with self._options(captions, first) as options:
            return self.cascade.prior(
                captions, prior=prior or self.settings.prior, guidance_scale=scale, **options
            )

    def decode(
        self,
        image_embedding: Float[Tensor, "batch dim"] | None,
        captions: Sequence[str],
        *,
        first: int = 0,
    ) -> UInt8[Tensor, "batch 3 64 64"]:
        """Decode image embeddings to 64 px images; None decodes the captions alone."""
        scale = self.settings.guidance_scale
        with self._options(captions, first) as options:
            return self.cascade.decode(
                image_embedding, captions, size=64, guidance_scale=scale, **options
            ).images[64]

    def enlarge(
        self, images: UInt8[Tensor, "batch 3 height width"], size: int, *, first: int = 0
    ) -> UInt8[Tensor, "batch 3 size size"]:
        """Enlarge images with the upsamplers, in batches that shrink as the images grow."""
        with self._options(images, first) as options:
            options["batch_size"] = max(self.settings.batch_size * 16 // size, 1)
            return self.cascade.upsample(images, size=size, **options)[size]

    def text_to_image(
        self, captions: Sequence[str], *, size: int, first: int = 0
    ) -> UInt8[Tensor, "batch 3 size size"]:
        """Sample images of captions: small ones in large batches, large ones in small batches."""
        with self._options(captions, first) as options:
            images = self.cascade.text_to_image(
                captions,
                size=64,
                prior=self.settings.prior,
                guidance_scale=self.settings.guidance_scale,
                prior_guidance_scale=self.settings.prior_guidance_scale,
                **options,
            ).images[64]
        return images if size == 64 else self.enlarge(images, size, first=first)

    @contextmanager
    def _options(self, rows: Sequence | Tensor, first: int) -> Iterator[dict[str, Any]]:
        """Yield the options of a call of the cascade; the bar of `progress` ends with it."""
        start = self.settings.seed + first
        with self._bar() as progress:
            yield {
                "seeds": range(start, start + len(rows)),
                "steps": self.settings.steps,
                "batch_size": self.settings.batch_size,
                "progress": progress,
            }

    @contextmanager
    def _bar(self) -> Iterator[Callable[[str, int, int], None]]:
        """Yield a progress callback for the cascade; its bar restarts with each stage."""
        current = ""
        with tqdm(leave=False, unit="step", disable=not self.settings.progress) as bar:

            def progress(stage: str, step: int, steps: int) -> None:
                nonlocal current
                if stage != current:
                    current = stage
                    bar.reset(total=steps)
                    bar.set_description(stage)
                bar.update(step - bar.n)

            yield progress
