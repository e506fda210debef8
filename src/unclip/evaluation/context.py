"""The context of all measurements: the protocol's images, and the bundle stage by stage."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from unclip.bundle import stage_file
from unclip.cascade import Cascade
from unclip.clip import ClipEmbedder
from unclip.evaluation.distributed import Ranks
from unclip.evaluation.features import (
    ClipNetwork,
    FeatureNetwork,
    Features,
    Images,
    compute_features,
    encode_texts,
    extract,
    weights_of,
)
from unclip.evaluation.generation import ImageFolder, Sampling, Settings, generate
from unclip.evaluation.protocol import Prompt, Protocol, fingerprint
from unclip.evaluation.sources import Real, Source, load_images, open_source, read_real
from unclip.files import write_tensors

SPLITS = VALIDATION, SEEN, HELD_OUT = "val", "test_seen", "test_held_out"

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable)


def kept(method: Method) -> Method:
    """Cache the results of a method by its arguments, as `Context.cached` does."""

    @wraps(method)
    def cached(self: "Context", *args: Any) -> Any:
        return self.cached((method.__name__, *args), lambda: method(self, *args))

    return cast(Method, cached)


@dataclass(kw_only=True, eq=False)
class Context:
    """Everything that measurements share.

    It has the protocol's images, sampled from a bundle or taken from a folder, the real images they
    are compared with, and the features of both; and of each split of emoji scenes real images,
    predicted embeddings and generated images. Everything is sampled, loaded and computed when it is
    first needed and then kept, so measurements can run in any order.

    Raises:
        FileNotFoundError: the bundle or the folder of images is missing.
        ValueError: one of their files is damaged.
    """

    protocol: Protocol
    settings: Settings  # how images are sampled; its seed is also that of every bootstrap
    networks: dict[str, Callable[[], FeatureNetwork]]  # constructors of feature networks by name
    data: Path
    out: Path  # folder of the results; sampled images are written to OUT/samples
    cache: Path  # folder of the features of real images
    model: InitVar[str | Path] = ""  # the bundle's folder
    images: InitVar[str | Path | None] = None  # a folder of images to measure instead of a bundle
    # number of 64 px images of a split that the bundle's stages are measured on; all of a split
    # that is not named
    counts: Mapping[str, int] = field(default_factory=dict)
    device: Any = None  # device of all networks; None is a GPU if there is one
    dtype: str = "auto"  # dtype of the bundle's networks; "auto" is float16 on a GPU, else float32
    max_bad_fraction: float = 0.01  # tolerated fraction of bad samples, which are left out
    ranks: Ranks = field(default_factory=Ranks)  # the processes that share the work

    def __post_init__(self, model: str | Path, images: str | Path | None) -> None:
        self.data, self.out, self.cache = Path(self.data), Path(self.out), Path(self.cache)
        self.device = self.ranks.device(self.device)
        self.given = ImageFolder.read(Path(images)) if images else None
        where = {"device": self.device, "dtype": self.dtype}
        self._cascade = None if images else Cascade.load(model, **where)
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

    def found(self, method: str) -> dict[tuple[Any, ...], Any]:
        """Return the results that a method has kept, by its arguments."""
        results = {key[1:]: one for key, one in self._kept.items() if key[0] == method}
        return {key: one for key, one in results.items() if not isinstance(one, Exception)}

    @property
    def seed(self) -> int:
        """Seed of all samples and bootstraps."""
        return self.settings.seed

    @property
    def cascade(self) -> Cascade:
        """The bundle."""
        if self._cascade is None:
            raise ValueError("it measures a bundle: give model= instead of generated=")
        return self._cascade

    @property
    def embedder(self) -> ClipEmbedder:
        """The bundle's CLIP."""
        return self.cascade.embedder

    @cached_property
    def sampling(self) -> Sampling:
        """The cascade with its settings."""
        return Sampling(self.settings, self.cascade)

    def real(self, split: str, size: int = 64, *, count: int | None = None) -> Real:
        """Load the first images of DATA/SPLIT/SIZE with their captions and metadata.

        Without a count it loads `counts[split]` images of 64 px, and all larger ones.
        """
        if count is None and size == 64:
            count = self.counts.get(split)
        if split in (SEEN, HELD_OUT) and not (self.data / split).is_dir():
            raise FileNotFoundError(f"{self.data} has no split {split}: only emoji scenes have one")
        key = ("real", split, size, count)
        return self.cached(key, lambda: read_real(self.data, split, size, count=count))

    def splits(self, *wanted: str) -> tuple[str, ...]:
        """Return the wanted splits that the data set has, or `val` if it has none of them."""
        return tuple(one for one in wanted if (self.data / one).is_dir()) or (VALIDATION,)

    @kept
    def predicted(self, split: str) -> Features:
        """Predict the image embeddings of `real(split)`'s captions with the chosen prior."""
        return self.sampling.predict(self.real(split).captions)

    @kept
    def generated(self, split: str) -> Images:
        """Sample 64 px images of `real(split)`'s captions; caption k has the seed `seed` + k.

        Images that the protocol has already sampled from the same captions are reused.
        """
        captions = self.real(split).captions
        if self._protocol_has(captions):
            return self.folder.load(range(len(captions)), self.protocol)
        return self.sampling.decode(self.predicted(split), captions)

    def samples(self, name: str, captions: Sequence[str], size: int) -> tuple[Images, Path]:
        """Sample images into OUT/samples/NAME-HASH; return them and the folder.

        Caption k has the seed `seed` + k.
        """
        prompts = [Prompt(f"{k:05d}", text, k) for k, text in enumerate(captions)]
        about: dict[str, Any] = {"format": "prompts", "captions": "first", "network": "none"}
        about |= {"name": name, "split": name, "reference": name}
        protocol = Protocol(**about, count=len(prompts), resolution=size)
        data = " ".join(f"{prompt.id}:{prompt.text}" for prompt in prompts)
        folder = generate(self.sampling, prompts, protocol, self.out / "samples", data=data)
        return folder.load(range(len(prompts)), protocol), folder.path

    @property
    def source(self) -> Source:
        """The split whose captions the protocol samples."""
        return self._source(self.protocol.split, self.protocol)

    @property
    def reference_source(self) -> Source:
        """The split that the protocol's images are compared with; may be `source` itself."""
        return self._source(self.protocol.reference, self.protocol)

    @property
    def reference(self) -> tuple[int, ...]:
        """Indices of the reference images in `reference_source`."""
        return tuple(range(len(self.reference_source.items)))[: self.protocol.reference_count]

    @cached_property
    def drawn(self) -> list[Prompt]:
        """The prompts that the protocol draws from `source`."""
        return self.protocol.draw(self.source.items)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the data behind the protocol's numbers."""
        return f"{self.source.fingerprint}{self.reference_source.fingerprint}"

    @property
    @kept
    def folder(self) -> ImageFolder:
        """The protocol's images, sampled by all ranks when first needed, or the given ones."""
        if self.given is None:
            out, shared = self.out / "samples", {"data": self.fingerprint, "ranks": self.ranks}
            return generate(self.sampling, self.drawn, self.protocol, out, **shared)
        wanted = {"protocol": self.protocol.describe(), "data": self.fingerprint}
        for name, value in wanted.items():
            if self.given.settings.get(name, value) != value:
                raise ValueError(
                    f"{self.given.path} was made for another {name}: use the one in its "
                    "settings.json, or sample again"
                )
        return self.given

    @property
    def prompts(self) -> list[str]:
        """The caption of each of the protocol's images."""
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
        keys = [(row.id, row.prompt or "") for row in self.folder.rows]
        return [place[key] for key in keys] if set(keys) <= place.keys() else None

    @kept
    def network(self, name: str) -> FeatureNetwork:
        """Load a feature network."""
        network = self.networks[name]()
        if isinstance(network, ClipNetwork) and weights_of(network.embedder) == self._own_clip:
            raise ValueError(
                f"the CLIP of the network {name} is the model's own, which overrates what was "
                "trained on it: use another one"
            )
        return network.to(self.device)

    @property
    def judge(self) -> ClipEmbedder:
        """A CLIP that no other stage has seen."""
        return cast(ClipNetwork, self.network("judge")).embedder

    @property
    def has_judge(self) -> bool:
        """Whether the bundle has a judge."""
        return stage_file(self.cascade.folder, "judge").is_file()

    def gather_features(self, name: str) -> None:
        """Compute all of a network's features on all ranks together; rank 0 gets them.

        Missing data, an unknown network and a folder of another protocol are errors. For a missing
        stage or file of weights, the measurement that needs it raises the error.
        """
        if name not in self.networks:
            raise ValueError(f"there is no network {name!r}; there are {', '.join(self.networks)}")
        if self.given is not None:
            _ = self.folder
        _ = self.source, self.reference_source
        try:
            _ = self.network(name), self.folder
        except (FileNotFoundError, ValueError):
            return
        self.features(name)
        self.reference_features(name)
        self._drawn_features(name)

    @kept
    def features(self, name: str) -> Features:
        """Compute a network's features of the protocol's images.

        On several ranks, `gather_features` has to come first.
        """
        load = partial(self.folder.load, protocol=self.protocol)
        return self._features(self.network(name), load, len(self.folder.rows))

    def reference_features(self, name: str) -> Features:
        """Compute a network's features of the reference images."""
        return self._real_features(name, self.reference_source, self.reference, self.protocol)

    def paired_features(self, name: str) -> Features | None:
        """Compute features of the real image behind each generated one; None if one is unknown."""
        if (items := self.items) is None:
            return None
        row = {item: k for k, item in enumerate(self._drawn_items)}
        return self._drawn_features(name)[[row[item] for item in items]]

    def real_pair(self, name: str) -> tuple[Features, Features] | None:
        """Return two sets of real features that share no image; None if there are too few.

        The first has as many rows as there are generated images, if possible. A distance between
        them is the floor of the generated images' distance.
        """
        reference, count = self.reference_features(name), len(self.folder.rows)
        if self.source is not self.reference_source:
            return self._drawn_features(name)[:count], reference
        if len(reference) < 4:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(reference), generator=generator)
        first = min(count, len(reference) // 2)
        return reference[order[:first]], reference[order[first:]]

    @kept
    def texts(self, name: str) -> Features:
        """Compute a CLIP network's embeddings of the protocol's captions."""
        return encode_texts(cast(ClipNetwork, self.network(name)).embedder, self.prompts)

    def split_features(self, name: str, kind: str, split: str) -> Features:
        """Compute a network's features of `real(split)` or `generated(split)`, as `kind` says."""
        real = self.real(split)
        if kind == "real":
            at_64 = replace(self.protocol, format="shards", resolution=64)
            rows = tuple(range(len(real)))
            return self._real_features(name, self._source(split, at_64), rows, at_64)
        if self._protocol_has(real.captions):
            return self.features(name)[: len(real)]
        return self.features_of(name, (kind, split), self.generated(split))

    def features_of(self, name: str, key: Any, images: Images) -> Features:
        """Compute a network's features of any images, once for each key."""
        network, progress = self.network(name), self.settings.progress
        key = ("features_of", name, key)
        return self.cached(key, lambda: extract(network, images, progress=progress))

    @kept
    def _source(self, split: str, protocol: Protocol) -> Source:
        return open_source(
            self.data,
            split,
            protocol,
            cache=self.cache,
            ranks=self.ranks,
            max_bad_fraction=self.max_bad_fraction,
            progress=self.settings.progress and self.ranks.first,
        )

    @cached_property
    def _own_clip(self) -> str | None:
        """Fingerprint of the CLIP that the images were made with, if it is known."""
        if self.given is not None:
            return self.given.settings.get("clip")
        return weights_of(self.embedder) if "clip" in self.cascade.metadata else None

    def _protocol_has(self, captions: Sequence[str]) -> bool:
        """Return whether the protocol's first images are the bundle's 64 px images of captions."""
        protocol = self.protocol
        if self.given is not None or (protocol.format, protocol.resolution) != ("shards", 64):
            return False
        return [prompt.text for prompt in self.drawn[: len(captions)]] == list(captions)

    @kept
    def _real_features(
        self, name: str, source: Source, indices: tuple[int, ...], protocol: Protocol
    ) -> Features:
        """Compute features of some real images or load them from the cache; rank 0 gets them."""
        network, ranks = self.network(name), self.ranks
        images = [protocol.resolution, protocol.crop, protocol.filter]
        chosen = indices if indices != tuple(range(len(indices))) else len(indices)
        weights = [network.name, network.fingerprint]
        key = fingerprint([source.stamp, chosen, images, weights])
        file = self.cache / f"{network.name}-{key}.safetensors"
        kept = _load(file, len(indices)) if ranks.first else None
        if ranks.share(kept is not None):
            return torch.empty(0) if kept is None else kept

        def load(rows: range) -> Images:
            return load_images(source, indices[rows.start : rows.stop], protocol)

        features = self._features(network, load, len(indices))
        if ranks.first:
            write_tensors(file, {"features": features.contiguous()})
        return features

    def _features(
        self, network: FeatureNetwork, load: Callable[[range], Images], count: int
    ) -> Features:
        progress = self.settings.progress
        return compute_features(network, load, count, ranks=self.ranks, progress=progress)

    def _drawn_features(self, name: str) -> Features:
        """Compute the features of all real images behind the prompts."""
        return self._real_features(name, self.source, self._drawn_items, self.protocol)

    @cached_property
    def _drawn_items(self) -> tuple[int, ...]:
        """Items of `source` behind the prompts, or all reference items if they include them."""
        items = sorted({prompt.item for prompt in self.drawn})
        within = self.source is self.reference_source and items[-1] < len(self.reference)
        return self.reference if within else tuple(items)


def _load(file: Path, count: int) -> Features | None:
    """Load cached features; None if they are missing, truncated or too few."""
    try:
        features = load_file(file)["features"]
    except (OSError, SafetensorError, KeyError):
        return None
    return features if len(features) == count else None
