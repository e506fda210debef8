"""The images of a protocol, the real images they are compared with, and the features of both.

Everything is sampled, loaded and computed when it is first needed and then kept.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from unclip.cascade import Cascade
from unclip.evaluation.distributed import Ranks
from unclip.evaluation.feature_cache import compute_features, real_features
from unclip.evaluation.features import FeatureNetwork
from unclip.evaluation.generation import ImageFolder, generate
from unclip.evaluation.networks import ClipNetwork, weights_of
from unclip.evaluation.protocol import Prompt, Protocol
from unclip.evaluation.sampling import Settings
from unclip.evaluation.sources import Source, open_source

T = TypeVar("T")


class ProtocolImages:
    """Images that a protocol prescribes, sampled from a bundle or taken from a folder.

    Args:
        protocol: which captions are sampled, and what their images are compared with.
        settings: how images are sampled; its seed is also that of every bootstrap.
        networks: a constructor for each feature network's name.
        data: folder of the data.
        out: folder of the results; sampled images are written to OUT/samples.
        model: the bundle's folder; ignored if `generated` is given.
        generated: a folder of images to measure instead of a bundle.
        cache: folder of the features of real images.
        device: device of all networks; None is a GPU if there is one.
        ranks: the processes that share the work.

    Raises:
        FileNotFoundError: the bundle or the folder of images is missing.
        ValueError: one of their files is damaged.
    """

    def __init__(
        self,
        *,
        protocol: Protocol,
        settings: Settings,
        networks: Mapping[str, Callable[[], FeatureNetwork]],
        data: str | Path,
        out: str | Path,
        model: str | Path | None = None,
        generated: str | Path | None = None,
        cache: str | Path = "runs/references",
        device: str | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.protocol = protocol
        self.settings = settings
        self.networks = dict(networks)
        self.data, self.out, self.cache = Path(data), Path(out), Path(cache)
        self.ranks = ranks or Ranks()
        self.device = self.ranks.device(device)
        self.cascade = None if generated else Cascade.load(model, device=self.device)
        self._given = ImageFolder.read(Path(generated)) if generated else None
        self._kept: dict[Any, Any] = {}

    def cached(self, key: Any, function: Callable[[], T]) -> T:
        """Return `function()`, called once for each key; an error is also kept and raised again."""
        if key not in self._kept:
            try:
                self._kept[key] = function()
            except (FileNotFoundError, ValueError) as error:
                self._kept[key] = error
        if isinstance(self._kept[key], Exception):
            raise self._kept[key]
        return self._kept[key]

    @property
    def seed(self) -> int:
        """Seed of all samples and bootstraps."""
        return self.settings.seed

    @cached_property
    def source(self) -> Source:
        """The split whose captions the protocol samples."""
        return open_source(self.data, self.protocol.split, self.protocol)

    @cached_property
    def reference_source(self) -> Source:
        """The split that the protocol's images are compared with; may be `source` itself."""
        if self.protocol.reference == self.protocol.split:
            return self.source
        return open_source(self.data, self.protocol.reference, self.protocol)

    @property
    def reference(self) -> range:
        """Indices of the reference images in `reference_source`."""
        return range(len(self.reference_source.items))[: self.protocol.reference_count]

    @cached_property
    def drawn(self) -> list[Prompt]:
        """The prompts that the protocol draws from `source`."""
        return self.protocol.draw(self.source.items)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the data behind the protocol's numbers."""
        return f"{self.source.fingerprint}{self.reference_source.fingerprint}"

    @property
    def folder(self) -> ImageFolder:
        """The protocol's images, sampled by all ranks when first needed, or the given ones.

        Raises:
            FileNotFoundError: the bundle lacks a stage, or the data are missing.
            ValueError: the folder was made for another protocol or from other data.
        """
        return self.cached("folder", self._open_folder)

    @property
    def opened_folder(self) -> ImageFolder | None:
        """The protocol's images if a measurement has asked for them."""
        folder = self._kept.get("folder")
        return folder if isinstance(folder, ImageFolder) else None

    @property
    def prompts(self) -> list[str]:
        """The caption of each of the protocol's images.

        Raises:
            ValueError: they are not known.
        """
        if self.folder.prompts is None:
            raise ValueError(
                "the captions are not known: put a manifest.jsonl next to the images, with one "
                'line {"id": …, "prompt": …} per image'
            )
        return self.folder.prompts

    @property
    def items(self) -> list[int] | None:
        """The item of `source` behind each image, found by id and caption; None if one has none."""
        place = {(prompt.id, prompt.text): prompt.item for prompt in self.drawn}
        found = [place.get((row.id, row.prompt)) for row in self.folder.rows]
        return None if None in found else found

    def network(self, name: str) -> FeatureNetwork:
        """Load a feature network.

        Raises:
            FileNotFoundError: its weights are missing; the message says how to get them.
            ValueError: there is no such network, or it is the model's own CLIP.
        """
        return self.cached(("network", name), lambda: self._load_network(name))

    @property
    def used_networks(self) -> dict[str, str]:
        """Fingerprint of each feature network that was loaded."""
        loaded = {key[1]: one for key, one in self._kept.items() if key[0] == "network"}
        return {k: one.fingerprint for k, one in loaded.items() if not isinstance(one, Exception)}

    def features(self, name: str, of: str = "generated") -> Float[Tensor, "n features"] | None:
        """Compute a network's features of the protocol's images or of real ones.

        On several ranks, `gather_features` has to come first.

        Args:
            name: name of the network.
            of: "generated": the protocol's images; "reference": the reference images; "drawn": all
                real images behind the prompts; "paired": the real image behind each generated one,
                None if that is unknown.
        """
        compute = {
            "generated": self._generated_features,
            "reference": lambda name: self._real_features(
                name, self.reference_source, self.reference
            ),
            "drawn": self._drawn_features,
            "paired": self._paired_features,
        }
        return self.cached(("features", name, of), lambda: compute[of](name))

    def gather_features(self, name: str) -> None:
        """Compute all of a network's features on all ranks together; rank 0 gets them.

        If the network or a stage of the bundle is missing, the measurement that needs it raises the
        error.

        Raises:
            FileNotFoundError: the data are missing.
            ValueError: there is no network of this name, or the given folder is of another
                protocol or of other data.
        """
        if name not in self.networks:
            raise ValueError(
                f"a measurement uses the network {name!r}; there are {', '.join(self.networks)}"
            )
        if self._given is not None:
            _ = self.folder
        _ = self.source, self.reference_source
        try:
            self.network(name)
            self.cached("folder", self._open_folder)
        except (FileNotFoundError, ValueError):
            return
        for of in ("generated", "reference", "drawn"):
            self.features(name, of)

    def texts(self, name: str) -> Float[Tensor, "n features"]:
        """Compute a CLIP network's embeddings of the protocol's captions."""
        return self.cached(("texts", name), lambda: self.network(name).texts(self.prompts))

    def real_pair(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return two sets of real features that share no image; None if there are too few.

        The first has as many rows as there are generated images, if possible. A distance between
        them is the floor of the generated images' distance.
        """
        reference, count = self.features(name, "reference"), len(self.folder.rows)
        if self.source is not self.reference_source:
            return self.features(name, "drawn")[:count], reference
        if len(reference) < 4:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(reference), generator=generator)
        first = min(count, len(reference) // 2)
        return reference[order[:first]], reference[order[first:]]

    def _open_folder(self) -> ImageFolder:
        if self._given is None:
            return generate(
                self.cascade,
                self.drawn,
                self.protocol,
                self.settings,
                self.out / "samples",
                data=self.fingerprint,
                ranks=self.ranks,
            )
        wanted = {"protocol": self.protocol.describe(), "data": self.fingerprint}
        for name, value in wanted.items():
            if self._given.settings.get(name, value) != value:
                raise ValueError(
                    f"{self._given.path} was made for another {name}: use the one in its "
                    "settings.json, or sample again"
                )
        return self._given

    def _load_network(self, name: str) -> FeatureNetwork:
        if name not in self.networks:
            raise ValueError(f"there is no network {name!r}; there are {', '.join(self.networks)}")
        network = self.networks[name]()
        if isinstance(network, ClipNetwork) and weights_of(network.embedder) == self._own_clip:
            raise ValueError(
                f"the CLIP of the network {name} is the model's own, which overrates what was "
                "trained on it: use another one"
            )
        return network.to(self.device)

    @cached_property
    def _own_clip(self) -> str | None:
        """Fingerprint of the CLIP that the images were made with, if it is known."""
        if self._given is not None:
            return self._given.settings.get("clip")
        return weights_of(self.cascade.embedder) if "clip" in self.cascade.metadata else None

    def _generated_features(self, name: str) -> Tensor | None:
        def load(rows: range) -> Tensor:
            return self.folder.load(rows, self.protocol)

        return compute_features(self.network(name), load, len(self.folder.rows), **self._shared)

    def _real_features(self, name: str, source: Source, indices: Sequence[int]) -> Tensor | None:
        network, protocol = self.network(name), self.protocol
        return real_features(network, source, indices, protocol, self.cache, **self._shared)

    @property
    def _shared(self) -> dict[str, Any]:
        """Arguments of every computation of features."""
        progress = self.settings.progress
        return {"device": self.device, "ranks": self.ranks, "progress": progress}

    def _drawn_features(self, name: str) -> Tensor | None:
        if self.source is self.reference_source and self._drawn_items == list(self.reference):
            return self.features(name, "reference")
        return self._real_features(name, self.source, self._drawn_items)

    def _paired_features(self, name: str) -> Tensor | None:
        if (items := self.items) is None:
            return None
        row = {item: k for k, item in enumerate(self._drawn_items)}
        return self.features(name, "drawn")[[row[item] for item in items]]

    @cached_property
    def _drawn_items(self) -> list[int]:
        """Items of `source` behind the prompts, or all reference items if they include them."""
        items = sorted({prompt.item for prompt in self.drawn})
        within = self.source is self.reference_source and items[-1] < len(self.reference)
        return list(self.reference) if within else items
