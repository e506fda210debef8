"""The second phase: any metrics over a folder of pictures, at any time, whoever made them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unclip.evaluation.folder import PictureFolder
from unclip.evaluation.networks import ClipNetwork, FeatureNetwork
from unclip.evaluation.protocol import Prompt, Protocol
from unclip.evaluation.ranks import Ranks
from unclip.evaluation.references import features_of, real_features
from unclip.evaluation.scores import Evidence, Metric, Score
from unclip.evaluation.sources import Source


@dataclass
class Scored:
    """What the metrics said, on rank 0.

    Attributes:
        scores: by name.
        not_available: why a metric has no score, by its name in the configuration.
        evidence: the features that it rests on.
    """

    scores: dict[str, Score] = field(default_factory=dict)
    not_available: dict[str, str] = field(default_factory=dict)
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
        folder: PictureFolder,
        reference: Source,
        source: Source,
        drawn: Sequence[Prompt],
        *,
        own_clip: str | None,
        ranks: Ranks = Ranks(),  # noqa: B008 (immutable)
    ) -> Scored:
        """The scores of all metrics; one whose network's file is missing is named with the reason.

        Args:
            folder: the pictures.
            reference: the split that they are measured against.
            source: the split whose captions were drawn.
            drawn: the prompts, of `source`.
            own_clip: fingerprint of the CLIP that the pictures were made with, if it is known.
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
        for name in dict.fromkeys(metric.network for metric in metrics.values()):
            try:
                network = self._build(name, own_clip).to(ranks.device(self.device))
            except FileNotFoundError as error:
                for key, metric in metrics.items():
                    if metric.network == name:
                        scored.not_available[key] = str(error)
                continue
            found = self._features(network, folder, reference, source, drawn, ranks)
            for kind, value in found.items():
                if value is not None:
                    parts[kind][name] = value
        if not ranks.first:
            return scored
        scored.evidence = Evidence(**parts, prompts=folder.prompts, seed=self.seed)
        for key, metric in metrics.items():
            if key not in scored.not_available:
                self._measure(key, metric, scored)
        return scored

    def _measure(self, key: str, metric: Metric, scored: Scored) -> None:
        evidence = scored.evidence
        if metric.needs_prompts and metric.network not in evidence.texts:
            scored.not_available[key] = (
                "no caption is known: put a manifest.jsonl beside the pictures, a line "
                '{"id": …, "prompt": …} each'
            )
            return
        try:
            scored.scores |= metric(evidence)
        except ValueError as error:
            scored.not_available[key] = str(error)

    def _build(self, name: str, own_clip: str | None) -> FeatureNetwork:
        if name not in self.networks:
            known = ", ".join(self.networks)
            raise ValueError(f"a metric asks for the network {name!r}; there are {known}")
        network = self.networks[name]()
        if isinstance(network, ClipNetwork) and network.fingerprint == own_clip:
            raise ValueError(
                f"the CLIP of network {name} is the model's own, which flatters what was trained "
                "on it: take another"
            )
        return network

    def _features(
        self,
        network: FeatureNetwork,
        folder: PictureFolder,
        reference: Source,
        source: Source,
        drawn: Sequence[Prompt],
        ranks: Ranks,
    ) -> dict[str, Any]:
        """All that a network says; the values are those of rank 0."""
        run = {"ranks": ranks, "device": ranks.device(self.device), "progress": self.progress}

        def real(of: Source, indices: Sequence[int]) -> Tensor | None:
            return real_features(network, of, indices, self.protocol, self.cache, **run)

        def generated(block: range) -> Tensor:
            return folder.load(block, self.protocol)

        ours = features_of(network, generated, len(folder.rows), **run)
        count = self.protocol.reference_count
        against = real(reference, range(len(reference.items))[:count])
        place = {prompt.id: prompt.item for prompt in drawn}
        items = sorted(set(place.values()))
        same = source.fingerprint == reference.fingerprint
        of_prompts = against if same and count is None else real(source, items)
        if not ranks.first:
            return {}
        row = {item: k for k, item in enumerate(items)}
        if same and count is None:
            row = {item: item for item in items}
        matched = all(picture.id in place for picture in folder.rows)
        texts = isinstance(network, ClipNetwork) and folder.prompts is not None
        return {
            "generated": ours,
            "reference": against,
            "real": _halves(against, len(ours), self.seed)
            if same
            else (of_prompts[: len(ours)], against),
            "paired": of_prompts[[row[place[picture.id]] for picture in folder.rows]]
            if matched
            else None,
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
