"""One evaluation: draw prompts, make pictures or take them, score them, measure the stages."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from unclip.cascade import Cascade
from unclip.evaluation.benchmark import Benchmark
from unclip.evaluation.folder import PictureFolder
from unclip.evaluation.generation import generate
from unclip.evaluation.limits import Bench, Limit, measure
from unclip.evaluation.networks import FeatureNetwork
from unclip.evaluation.parts import Given
from unclip.evaluation.protocol import Protocol
from unclip.evaluation.ranks import Ranks
from unclip.evaluation.report import surroundings
from unclip.evaluation.sampling import Settings
from unclip.evaluation.scores import Metric
from unclip.evaluation.scoring import Material, Scored, Scorer
from unclip.evaluation.sources import open_source

FORMAT = 2


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found; only rank 0 has one.

    Attributes:
        results: what results.json holds.
        folder: the pictures.
        scored: the scores with what they rest on.
    """

    results: dict[str, Any]
    folder: PictureFolder
    scored: Scored


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Pictures by a protocol and their scores; then each stage by itself.

    Args:
        protocol: which pictures, measured against which.
        metrics: by any name; None leaves one out.
        networks: a constructor for each feature network's name.
        settings: how pictures are sampled.
        benchmark: measures the stages one by one, on shards; None leaves that out.
        limits: by any name; each makes pictures of its own; None leaves one out.
        cache: where features of real pictures are kept.
        device: None is a GPU if there is one.
    """

    protocol: Protocol
    metrics: Mapping[str, Metric | None]
    networks: Mapping[str, Callable[[], FeatureNetwork]]
    settings: Settings = field(default_factory=Settings)
    benchmark: Benchmark | None = None
    limits: Mapping[str, Limit | None] = field(default_factory=dict)
    cache: str | Path = "runs/references"
    device: str | None = None

    def __call__(
        self,
        *,
        data: str | Path,
        out: str | Path,
        model: str | Path | None = None,
        generated: str | Path | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008 (immutable)
    ) -> Outcome | None:
        """Evaluates a bundle, or pictures that are there already.

        Args:
            data: the folder of the data.
            out: takes samples/ and pictures/.
            model: the bundle's folder; not opened where `generated` is given.
            generated: a folder of pictures, ours or anybody's.
            ranks: the processes that share the work; the first gets the outcome.

        Raises:
            FileNotFoundError: bundle, data or pictures are missing.
            ValueError: one of them is damaged, a CLIP that shall judge is the model's own, or the
                pictures were made by another protocol or of other data.
        """
        started = time.perf_counter()
        cascade = None
        if generated is None:
            cascade = Cascade.load(model, device=ranks.device(self.device))
        source = open_source(data, self.protocol.split, self.protocol)
        reference = source
        if self.protocol.reference != self.protocol.split:
            reference = open_source(data, self.protocol.reference, self.protocol)
        drawn = self.protocol.draw(source.items)
        fingerprint = f"{source.fingerprint}{reference.fingerprint}"
        if cascade is None:
            folder = PictureFolder.read(Path(generated))
            _check_same(folder, {"protocol": self.protocol.describe(), "data": fingerprint})
        else:
            folder = generate(
                cascade,
                drawn,
                self.protocol,
                self.settings,
                Path(out) / "samples",
                data=fingerprint,
                ranks=ranks,
            )
        sampled = time.perf_counter()
        material = Material(folder, source, reference, drawn)
        scorer = self._scorer()
        scored = scorer(material, own_clip=folder.settings.get("clip"), ranks=ranks)
        if not ranks.first:
            return None
        seconds = {"sample": sampled - started, "score": time.perf_counter() - sampled}
        measured: dict[str, Any] = {}
        if cascade is not None:
            bench = Bench(cascade=cascade, data=Path(data), out=Path(out), settings=self.settings)
            measured = self._bundle(bench, folder, scored)
            seconds |= measured.pop("seconds")
        seconds["total"] = time.perf_counter() - started
        results = {
            "format": FORMAT,
            "model": None if cascade is None else str(model),
            "data": str(data),
            "key": self.protocol.key(fingerprint, len(folder.rows)),
            "n": len(folder.rows),
            "n_reference": len(scorer.reference(material)),
            **self._describe(folder, scored),
            **measured,
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            **surroundings(ranks.device(self.device)),
        }
        return Outcome(results, folder, scored)

    def _bundle(self, bench: Bench, folder: PictureFolder, scored: Scored) -> dict[str, Any]:
        """What is measured of a bundle beside its pictures, and how long each part took."""
        measured: dict[str, Any] = {"seconds": {}}
        if self.benchmark is not None:
            given = self._given(folder, scored)
            measured |= self.benchmark(bench.cascade, bench.data, bench.out, given=given)
        if self.limits:
            since = time.perf_counter()
            measured["limits"] = measure(self.limits, bench)
            measured["seconds"]["limits"] = time.perf_counter() - since
        return measured

    def _describe(self, folder: PictureFolder, scored: Scored) -> dict[str, Any]:
        """What was measured, how, and what it came to."""
        return {
            "generated": str(folder.path),
            "protocol": self.protocol.describe(),
            "scores": {name: score.plain() for name, score in scored.scores.items()},
            "not_available": scored.not_available,
            "networks": scored.networks,
            "seed": self.settings.seed,
            "sampling": asdict(self.settings),
            "made_with": folder.settings,
        }

    def _scorer(self) -> Scorer:
        return Scorer(
            protocol=self.protocol,
            metrics=self.metrics,
            networks=self.networks,
            cache=Path(self.cache),
            device=self.device,
            seed=self.settings.seed,
            progress=self.settings.progress,
        )

    def _given(self, folder: PictureFolder, scored: Scored) -> Given | None:
        """What the benchmark would make and measure a second time, where it is the same."""
        if not self.benchmark.draws_as(self.protocol) or scored.evidence is None:
            return None
        images: Tensor = folder.load(range(len(folder.rows)), self.protocol)
        evidence, name = scored.evidence, "effnet_lite0"
        features: dict[str, Tensor] = {}
        if name in evidence.generated:
            features = {
                "prior": evidence.generated[name],
                "reference": evidence.reference[name],
                "real": evidence.paired[name],
            }
        return Given(images, features)


def _check_same(folder: PictureFolder, wanted: Mapping[str, Any]) -> None:
    """Compares what pictures say that they were made for, if anything, with what is asked now."""
    for name, value in wanted.items():
        if folder.settings.get(name, value) != value:
            raise ValueError(
                f"{folder.path} was made for another {name}: ask for the one in its settings.json, "
                "or sample again"
            )
