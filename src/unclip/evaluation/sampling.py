"""Samples of an evaluation: one seed per image, one progress bar per call."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm import tqdm

from unclip.cascade import Cascade
from unclip.evaluation.features import Features, Images
from unclip.text_to_image import stage_of_prior


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How images are sampled."""

    # where image embeddings come from: "diffusion", "ar", "linear" or "none" (z_t itself)
    prior: str = "diffusion"
    guidance_scale: float | None = None  # guidance scale of the decoder; None is the stage's own
    # guidance scale of the prior; None is the stage's own
    prior_guidance_scale: float | None = None
    # sampler steps of stages by name; None, and the others, use the stage's own
    steps: Mapping[str, int | None] = field(default_factory=dict)
    batch_size: int = 50  # number of 64 px images per batch; larger images use smaller batches
    seed: int = 0  # image k has the seed `seed` + k
    progress: bool = True  # show progress bars

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        for name in ("guidance_scale", "prior_guidance_scale"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number")
        stage_of_prior(self.prior)
        given = {stage: count for stage, count in self.steps.items() if count is not None}
        object.__setattr__(self, "steps", given)


@dataclass
class Sampling:
    """A cascade with settings; row k of a call has the seed `settings.seed` + `first` + k."""

    settings: Settings
    cascade: Cascade

    def predict(
        self, captions: Sequence[str], *, first: int = 0, prior: str | None = None
    ) -> Features:
        """Predict image embeddings of captions; `prior` replaces that of the settings."""
        scale, prior = self.settings.prior_guidance_scale, prior or self.settings.prior
        with self._options(captions, first) as options:
            return self.cascade.prior(captions, prior=prior, guidance_scale=scale, **options)

    def decode(self, z: Features | None, captions: Sequence[str], *, first: int = 0) -> Images:
        """Decode image embeddings to 64 px images; None decodes the captions alone."""
        scale = self.settings.guidance_scale
        with self._options(captions, first) as options:
            made = self.cascade.decode(z, captions, size=64, guidance_scale=scale, **options)
        return made.images[64]

    def enlarge(self, images: Images, size: int, *, first: int = 0) -> Images:
        """Enlarge images with the upsamplers, in batches that shrink as the images grow."""
        with self._options(images, first) as options:
            options["batch_size"] = max(self.settings.batch_size * 16 // size, 1)
            return self.cascade.upsample(images, size=size, **options)[size]

    def text_to_image(self, captions: Sequence[str], *, size: int, first: int = 0) -> Images:
        """Sample images of captions: small ones in large batches, large ones in small batches."""
        z = self.predict(captions, first=first)
        images = self.decode(z, captions, first=first)
        return images if size == 64 else self.enlarge(images, size, first=first)

    @contextmanager
    def _options(self, rows: Sequence | Tensor, first: int) -> Iterator[dict[str, Any]]:
        """Yield the options of a call of the cascade; the bar of `progress` ends with it."""
        start = self.settings.seed + first
        with tqdm(leave=False, unit="step", disable=not self.settings.progress) as bar:
            yield {
                "seeds": range(start, start + len(rows)),
                "steps": self.settings.steps,
                "batch_size": self.settings.batch_size,
                "progress": _progress(bar),
            }


def _progress(bar: tqdm) -> Callable[[str, int, int], None]:
    """Return a progress callback for the cascade; its bar restarts with each stage."""
    current = ""

    def progress(stage: str, step: int, steps: int) -> None:
        nonlocal current
        if stage != current:
            current = stage
            bar.reset(total=steps)
            bar.set_description(stage)
        bar.update(step - bar.n)

    return progress
