"""The context of all measurements: the protocol's images, and the bundle stage by stage."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor

from unclip.clip import ClipEmbedder
from unclip.evaluation.features import extract
from unclip.evaluation.generation import generate
from unclip.evaluation.protocol import Prompt, Protocol
from unclip.evaluation.protocol_images import ProtocolImages
from unclip.evaluation.sampling import Sampling
from unclip.evaluation.sources import Real, read_real

SPLITS = VALIDATION, SEEN, HELD_OUT = "val", "test_seen", "test_held_out"


class Context(ProtocolImages):
    """Everything that measurements share.

    Besides the protocol's images it has, split by split, real images, predicted embeddings and
    generated images. Results are cached, so measurements can run in any order.

    Args:
        counts: number of 64 px images of a split that the bundle's stages are measured on; all of
            a split that is not named.
        common: arguments of `ProtocolImages`.
    """

    def __init__(self, *, counts: Mapping[str, int] | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.counts = dict(counts or {})

    @property
    def embedder(self) -> ClipEmbedder:
        """The bundle's CLIP."""
        return self.cascade.embedder

    @property
    def judge(self) -> ClipEmbedder:
        """A CLIP that no other stage has seen.

        Raises:
            FileNotFoundError: the bundle has none; the message has the command that trains it.
            ValueError: it is the model's own CLIP.
        """
        return self.network("judge").embedder

    @cached_property
    def sampling(self) -> Sampling:
        """The cascade with its settings."""
        return Sampling(self.settings, self.cascade)

    def real(self, split: str, size: int = 64, *, count: int | None = None) -> Real:
        """Load the first images of DATA/SPLIT/SIZE with their captions and metadata.

        Args:
            split: such as "val".
            size: width and height in pixels.
            count: number of images; None is `counts[split]` at 64 px, else all of them.

        Raises:
            FileNotFoundError: there are no such shards.
        """
        if count is None and size == 64:
            count = self.counts.get(split)
        return self.cached(
            ("real", split, size, count), lambda: read_real(self.data, split, size, count=count)
        )

    def predicted(self, split: str) -> Float[Tensor, "count dim"]:
        """Predict the image embeddings of `real(split)`'s captions with the chosen prior."""
        return self.cached(
            ("predicted", split), lambda: self.sampling.predict(self.real(split).captions)
        )

    def generated(self, split: str) -> UInt8[Tensor, "count 3 64 64"]:
        """Sample 64 px images of `real(split)`'s captions; caption k has the seed `seed` + k.

        Images that the protocol has already sampled from the same captions are reused.
        """

        def sample() -> Tensor:
            captions = self.real(split).captions
            if self._protocol_has(captions):
                return self.folder.load(range(len(captions)), self.protocol)
            return self.sampling.decode(self.predicted(split), captions)

        return self.cached(("generated", split), sample)

    def samples(
        self, name: str, captions: Sequence[str], size: int
    ) -> tuple[UInt8[Tensor, "count 3 size size"], Path]:
        """Sample an image of each caption into OUT/samples; return the images and the folder.

        Args:
            name: name of the folder, to which a hash of all settings is added.
            captions: caption k has the seed `seed` + k.
            size: 64, 256 or 1024 pixels.
        """
        prompts = [Prompt(f"{k:05d}", text, k) for k, text in enumerate(captions)]
        protocol = Protocol(
            name=name,
            format="prompts",
            split=name,
            captions="first",
            count=len(prompts),
            resolution=size,
            reference=name,
            network="none",
        )
        data = " ".join(f"{prompt.id}:{prompt.text}" for prompt in prompts)
        folder = generate(
            self.cascade, prompts, protocol, self.settings, self.out / "samples", data=data
        )
        return folder.load(range(len(prompts)), protocol), folder.path

    def split_features(self, name: str, kind: str, split: str) -> Float[Tensor, "n features"]:
        """Compute a network's features of `real(split)` or `generated(split)`.

        Features that the protocol has already computed of the same images are reused.

        Args:
            name: name of the network.
            kind: "real" or "generated".
            split: such as "val".
        """
        real, protocol = self.real(split), self.protocol
        known = self.opened_folder and ("features", name, "generated") in self._kept
        if known and self._at_64_px:
            if split == protocol.split and self._protocol_has(real.captions):
                of = "generated" if kind == "generated" else "paired"
                return self.features(name, of)[: len(real)]
            if kind == "real" and split == protocol.reference and len(real) <= len(self.reference):
                return self.features(name, "reference")[: len(real)]
        images = real.images if kind == "real" else self.generated(split)
        return self.features_of(name, (kind, split), images)

    def features_of(
        self, name: str, key: Any, images: UInt8[Tensor, "n 3 height width"]
    ) -> Float[Tensor, "n features"]:
        """Compute a network's features of any images, once for each key."""
        progress = self.settings.progress
        return self.cached(
            ("features of", name, key),
            lambda: extract(self.network(name), images, progress=progress),
        )

    @property
    def _at_64_px(self) -> bool:
        """Whether the protocol's images are the bundle's own, of the size of `generated`."""
        protocol = self.protocol
        return self.cascade is not None and (protocol.format, protocol.resolution) == ("shards", 64)

    def _protocol_has(self, captions: Sequence[str]) -> bool:
        """Return whether the protocol's first images are 64 px images of these captions."""
        if not self._at_64_px:
            return False
        return [prompt.text for prompt in self.drawn[: len(captions)]] == list(captions)
