"""The benchmark's samples: one seed a picture, one progress bar a call."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm import tqdm

from unclip.bundle import StageMetadata, build
from unclip.cascade import Cascade
from unclip.evaluation.pictures import to_uint8
from unclip.stages import Stage

if TYPE_CHECKING:
    from unclip.evaluation.benchmark import Benchmark


class Sampling:
    """A cascade with a benchmark's guidance, steps and seeds; row k of a call takes `seed` + k.

    Args:
        settings: whose guidance, steps, batch size and seed are used.
        cascade: what samples.
    """

    def __init__(self, settings: "Benchmark", cascade: Cascade) -> None:
        self.settings = settings
        self.cascade = cascade

    def predict(self, captions: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """The prior's image embeddings of captions."""
        with self._bar() as progress:
            return self.cascade.prior(
                captions,
                seeds=self._seeds(captions),
                guidance_scale=self.settings.prior_guidance_scale,
                steps=self.settings.steps,
                batch_size=self.settings.batch_size,
                progress=progress,
            )

    def decode(
        self, image_embedding: Float[Tensor, "batch dim"], captions: Sequence[str]
    ) -> UInt8[Tensor, "batch 3 64 64"]:
        """The decoder's pictures of image embeddings."""
        with self._bar() as progress:
            return self.cascade.decode(
                image_embedding,
                captions,
                seeds=self._seeds(captions),
                size=64,
                guidance_scale=self.settings.guidance_scale,
                steps=self.settings.steps,
                batch_size=self.settings.batch_size,
                progress=progress,
            ).images[64]

    def enlarge(
        self, images: UInt8[Tensor, "batch 3 height width"], size: int
    ) -> UInt8[Tensor, "batch 3 size size"]:
        """The upsamplers' enlargements, in batches that are smaller as pictures are larger."""
        with self._bar() as progress:
            return self.cascade.upsample(
                images,
                seeds=self._seeds(images),
                size=size,
                steps=self.settings.steps,
                batch_size=max(self.settings.batch_size * 16 // size, 1),
                progress=progress,
            )[size]

    def text_to_image(
        self, captions: Sequence[str], *, size: int
    ) -> UInt8[Tensor, "batch 3 size size"]:
        """Pictures of captions; the small ones are made in large batches, the large in small."""
        return self.enlarge(self.decode(self.predict(captions), captions), size)

    @torch.inference_mode()
    def untrained(
        self, image_embedding: Float[Tensor, "batch dim"], captions: Sequence[str]
    ) -> UInt8[Tensor, "batch 3 height width"]:
        """What the decoder made of the same embeddings and captions before training."""
        settings, device = self.settings, self.cascade.device
        stage = freshly_built(self.cascade.metadata["decoder"], seed=settings.seed).to(device)
        images = []
        for start in range(0, len(captions), settings.batch_size):
            part = slice(start, start + settings.batch_size)
            text = self.cascade.embedder.text(captions[part])._asdict()
            batch = {**text, "image_embedding": image_embedding[part].to(device)}
            seeds = self._seeds(captions)[part]
            sampled = stage.sample(
                stage.condition(batch),
                generators=[torch.Generator().manual_seed(seed) for seed in seeds],
                guidance_scale=1,
                steps=settings.untrained_steps,
            )
            images.append(to_uint8(sampled.cpu()))
        return torch.cat(images)

    def _seeds(self, rows: Sequence | Tensor) -> range:
        return range(self.settings.seed, self.settings.seed + len(rows))

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
