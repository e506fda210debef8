"""The second phase: any metrics over a folder of pictures, at any time, whoever made them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.evaluation.folder import PictureFolder
from unclip.evaluation.networks import ClipNetwork, FeatureNetwork, weights_of
from unclip.evaluation.protocol import Prompt, Protocol
from unclip.evaluation.ranks import Ranks
from unclip.evaluation.references import features_of, real_features
from unclip.evaluation.scores import Evidence, Metric, Pictures, Score
from unclip.evaluation.sources import Source


@dataclass(frozen=True)
class Material:
    """What is measured.

    Attributes:
        folder: the pictures.
        source: the split whose captions were drawn.
        reference: the split that the pictures are measured against; may be the same object.
        drawn: the prompts, of `source`.
    """

    folder: PictureFolder
    source: Source
    reference: Source
    drawn: Sequence[Prompt]

    @property
    def items(self) -> list[int] | None:
        """The item of `source` that each picture stands for: of the same id and the same words.

        None where a picture has none.
        """
        place = {(prompt.id, prompt.text): prompt.item for prompt in self.drawn}
        found = [place.get((picture.id, picture.prompt)) for picture in self.folder.rows]
        return None if None in found else found

    def about(self) -> list[Mapping[str, Any]] | None:
        """What the source says of each picture's scene beside the caption."""
        items = self.items
        return None if items is None else [self.source.items[item].about for item in items]


@dataclass
class Scored:
    """What the metrics said, on rank 0.

    Attributes:
        scores: by name.
        not_available: why a metric has no score, by its name in the configuration.
        networks: the fingerprint of each network, by its name.
        evidence: the features that it rests on.
    """

    scores: dict[str, Score] = field(default_factory=dict)
    not_available: dict[str, str] = field(default_factory=dict)
    networks: dict[str, str] = field(default_factory=dict)
    evidence: Evidence | None = None


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Measures a folder of pictures by a protocol.

    Args:
        protocol: how real pictures are prepared, and which they are.
        metrics: by any name; None leaves one out.
        networks: a constructor for each feature network's name; built when a metric asks for it.
        cache: where features of real pictures are kept.
        device: None is a GPU if there is one.
        seed: of everything that is drawn.
        progress: show bars.
    """

    protocol: Protocol
    metrics: Mapping[str, Metric | None]
    networks: Mapping[str, Callable[[], FeatureNetwork]]
    cache: Path
    device: str | None = None
    seed: int = 0
    progress: bool = True

    def __call__(
        self,
        material: Material,
        *,
        own_clip: str | None,
        ranks: Ranks = Ranks(),  # noqa: B008 (immutable)
    ) -> Scored:
        """The scores of all metrics; one whose network's file is missing is named with the reason.

        Args:
            material: pictures, prompts and what they are measured against.
            own_clip: `weights_of` the CLIP that the pictures were made with, if it is known.
            ranks: the processes that share the work; only the first gets scores.

        Raises:
            ValueError: a CLIP that shall judge is the model's own, a picture is damaged, or a
                metric asks for a network that has no constructor.
        """
        scored = Scored()
        metrics = {name: metric for name, metric in self.metrics.items() if metric is not None}
        parts: dict[str, dict[str, Any]] = {
            kind: {} for kind in ("generated", "reference", "real", "paired", "texts", "logits")
        }
        names = dict.fromkeys(metric.network for metric in metrics.values())
        for name in (name for name in names if name is not None):
            try:
                network = self._build(name, own_clip).to(ranks.device(self.device))
            except FileNotFoundError as error:
                for key, metric in metrics.items():
                    if metric.network == name:
                        scored.not_available[key] = str(error)
                continue
            scored.networks[name] = network.fingerprint
            found = self._features(network, material, ranks)
            for kind, value in found.items():
                if value is not None:
                    parts[kind][name] = value
        if not ranks.first:
            return scored
        folder = material.folder
        scored.evidence = Evidence(
            **parts,
            prompts=folder.prompts,
            about=material.about(),
            pictures=Pictures(len(folder.rows), lambda rows: folder.load(rows, self.protocol)),
            seed=self.seed,
        )
        for key, metric in metrics.items():
            if key not in scored.not_available:
                self._measure(key, metric, scored)
        return scored

    def _measure(self, key: str, metric: Metric, scored: Scored) -> None:
        evidence = scored.evidence
        if metric.needs_prompts and evidence.prompts is None:
            scored.not_available[key] = (
                "no caption is known: put a manifest.jsonl beside the pictures, a line "
                '{"id": …, "prompt": …} each'
            )
            return
        if metric.needs_reference and metric.network not in evidence.reference:
            scored.not_available[key] = "the protocol has prompts alone: nothing to compare with"
            return
        try:
            found = metric(evidence)
        except (FileNotFoundError, ValueError) as error:
            scored.not_available[key] = str(error)
            return
        network = scored.networks.get(metric.network)
        about = {} if network is None else {"network": network}
        for name, score in found.items():
            scored.scores[name] = score._replace(about={**score.about, **about})

    def _build(self, name: str, own_clip: str | None) -> FeatureNetwork:
        if name not in self.networks:
            known = ", ".join(self.networks)
            raise ValueError(f"a metric asks for the network {name!r}; there are {known}")
        network = self.networks[name]()
        if isinstance(network, ClipNetwork) and weights_of(network.embedder) == own_clip:
            raise ValueError(
                f"the CLIP of network {name} is the model's own, which flatters what was trained "
                "on it: take another"
            )
        return network

    def reference(self, material: Material) -> range:
        """The pictures of the reference set."""
        if not material.reference.has_pictures:
            return range(0)
        return range(len(material.reference.items))[: self.protocol.reference_count]

    def _features(
        self, network: FeatureNetwork, material: Material, ranks: Ranks
    ) -> dict[str, Any]:
        """All that a network says; the values are those of rank 0."""
        run = {"ranks": ranks, "device": ranks.device(self.device), "progress": self.progress}
        folder, source, items = material.folder, material.source, material.items

        def real(of: Source, indices: Sequence[int]) -> Tensor | None:
            return real_features(network, of, indices, self.protocol, self.cache, **run)

        def generated(block: range) -> Tensor:
            return folder.load(block, self.protocol)

        ours = features_of(network, generated, len(folder.rows), **run)
        reference = self.reference(material)
        against = real(material.reference, reference) if len(reference) else None
        same = source is material.reference
        drawn = sorted({prompt.item for prompt in material.drawn})
        if same and drawn and drawn[-1] < len(reference):
            drawn, of_drawn = list(reference), against
        else:
            of_drawn = real(source, drawn) if source.has_pictures else None
        if not ranks.first:
            return {}
        row = {item: k for k, item in enumerate(drawn)}
        if same or of_drawn is None:
            pair = None if against is None else _halves(against, len(ours), self.seed)
        else:
            pair = of_drawn[: len(ours)], against
        texts = isinstance(network, ClipNetwork) and folder.prompts is not None
        return {
            "generated": ours,
            "reference": against,
            "real": pair,
            "paired": None
            if items is None or of_drawn is None
            else of_drawn[[row[item] for item in items]],
            "texts": network.texts(folder.prompts) if texts else None,
            "logits": _logits(network),
        }


def _halves(features: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor] | None:
    """`count` rows and the others, or two halves: no picture on both sides."""
    if len(features) < 4:
        return None
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    first = min(count, len(features) // 2)
    return features[order[:first]], features[order[first:]]


def _logits(network: FeatureNetwork) -> Callable[[Tensor], Tensor] | None:
    """The network's classifier, by itself: the network need not stay on a GPU for it."""
    logits = getattr(network, "logits", None)
    return None if logits is None else network.cpu().logits
