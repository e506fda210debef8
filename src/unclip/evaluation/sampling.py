"""An evaluation's samples: one seed a picture, one progress bar a call."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from unclip.bundle import StageMetadata, build
from unclip.cascade import Cascade
from unclip.images import to_uint8
from unclip.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How pictures are sampled.

    Args:
        guidance_scale: the decoder's; None is its own.
        prior_guidance_scale: the prior's; None is its own.
        steps: sampler steps of the stages named; None, and the others, are their own.
        batch_size: pictures of 64 px at a time; larger pictures go in smaller batches.
        seed: picture k has `seed` + k.
        progress: show bars.
    """

    guidance_scale: float | None = None
    prior_guidance_scale: float | None = None
    steps: Mapping[str, int | None] = field(default_factory=dict)
    batch_size: int = 50
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it is at least 1")
        given = {stage: count for stage, count in self.steps.items() if count is not None}
        object.__setattr__(self, "steps", given)

    def quiet(self) -> "Settings":
        """The same without bars."""
        return replace(self, progress=False)


class Sampling:
    """A cascade with settings; row k of a call takes the seed `settings.seed` + `first` + k.

    Args:
        settings: guidance, steps, batch size and seed.
        cascade: what samples.
    """

    def __init__(self, settings: Settings, cascade: Cascade) -> None:
        self.settings = settings
        self.cascade = cascade

    def predict(
        self, captions: Sequence[str], *, first: int = 0, prior: str = "diffusion"
    ) -> Float[Tensor, "batch dim"]:
        """Image embeddings of captions from a prior of `Cascade.prior`."""
        with self._bar() as progress:
            return self.cascade.prior(
                captions,
                seeds=self._seeds(captions, first),
                prior=prior,
                guidance_scale=self.settings.prior_guidance_scale,
                steps=self.settings.steps,
                batch_size=self.settings.batch_size,
                progress=progress,
            )

    def decode(
        self,
        image_embedding: Float[Tensor, "batch dim"],
        captions: Sequence[str],
        *,
        first: int = 0,
    ) -> UInt8[Tensor, "batch 3 64 64"]:
        """The decoder's pictures of image embeddings."""
        with self._bar() as progress:
            return self.cascade.decode(
                image_embedding,
                captions,
                seeds=self._seeds(captions, first),
                size=64,
                guidance_scale=self.settings.guidance_scale,
                steps=self.settings.steps,
                batch_size=self.settings.batch_size,
                progress=progress,
            ).images[64]

    def enlarge(
        self, images: UInt8[Tensor, "batch 3 height width"], size: int, *, first: int = 0
    ) -> UInt8[Tensor, "batch 3 size size"]:
        """The upsamplers' enlargements, in batches that are smaller as pictures are larger."""
        with self._bar() as progress:
            return self.cascade.upsample(
                images,
                seeds=self._seeds(images, first),
                size=size,
                steps=self.settings.steps,
                batch_size=max(self.settings.batch_size * 16 // size, 1),
                progress=progress,
            )[size]

    def text_to_image(
        self, captions: Sequence[str], *, size: int, first: int = 0
    ) -> UInt8[Tensor, "batch 3 size size"]:
        """Pictures of captions; the small ones are made in large batches, the large in small."""
        image_embedding = self.predict(captions, first=first)
        images = self.decode(image_embedding, captions, first=first)
        return images if size == 64 else self.enlarge(images, size, first=first)

    def null_embedding(self) -> Float[Tensor, "1 dim"]:
        """What stands for no image embedding: the decoder then has the caption alone, as GLIDE."""
        decoder = self.cascade.stage("decoder")
        return decoder.image_scaling.denormalize(decoder.null_image_embedding).cpu()

    @torch.inference_mode()
    def untrained(
        self, image_embedding: Float[Tensor, "batch dim"], captions: Sequence[str], *, steps: int
    ) -> UInt8[Tensor, "batch 3 height width"]:
        """What the decoder made of the same embeddings and captions before training."""
        settings, device = self.settings, self.cascade.device
        stage = freshly_built(self.cascade.metadata["decoder"], seed=settings.seed).to(device)
        images = []
        for start in range(0, len(captions), settings.batch_size):
            part = slice(start, start + settings.batch_size)
            text = self.cascade.embedder.text(captions[part])._asdict()
            batch = {**text, "image_embedding": image_embedding[part].to(device)}
            seeds = self._seeds(captions, 0)[part]
            sampled = stage.sample(
                stage.condition(batch),
                generators=[torch.Generator().manual_seed(seed) for seed in seeds],
                guidance_scale=1,
                steps=steps,
            )
            images.append(to_uint8(sampled.cpu()))
        return torch.cat(images)

    def _seeds(self, rows: Sequence | Tensor, first: int) -> range:
        start = self.settings.seed + first
        return range(start, start + len(rows))

    @contextmanager
    def _bar(self) -> Iterator[Callable[[str, int, int], None]]:
        """A bar that the cascade's progress moves; it starts anew with each stage."""
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


def freshly_built(metadata: StageMetadata, *, seed: int) -> Stage:
    """A stage as it was before training: built from its recipe with the weights of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stage = build(metadata.recipe)
    return stage.requires_grad_(False).eval()
