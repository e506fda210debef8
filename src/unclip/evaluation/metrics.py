"""The metrics: distances between sets of features, diversity, and agreement with the caption."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore as TorchInceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from unclip.evaluation.frechet import bootstrap_error, fit_gaussian, frechet_distance
from unclip.evaluation.judge import choose, distractors
from unclip.evaluation.scores import Evidence, Metric, Score, around, mean_score


class _Given(nn.Module):
    """Stands for torchmetrics' feature network where the features are there already."""

    def forward(self, features: Tensor) -> Tensor:
        return features


@dataclass(frozen=True, kw_only=True)
class Frechet(Metric):
    """The Fréchet distance (Heusel et al. 2017): `fid` in Inception's features, else `fd_NETWORK`.

    Args:
        network: whose features.
        resamples: of the bootstrap.
    """

    network: str
    resamples: int = 10
    needs_reference = True

    def __call__(self, evidence: Evidence) -> dict[str, Score]:
        """The distance, with the real pictures' own as its floor."""
        generated = evidence.generated[self.network]
        reference = evidence.reference[self.network]
        value = _frechet(generated, reference)
        error = bootstrap_error(generated, reference, resamples=self.resamples, seed=evidence.seed)
        score = Score(
            value,
            error,
            around(value, error),
            len(generated),
            "lower",
            len(reference),
            **_of_real(evidence, self.network, _frechet),
        )
        return {"fid" if self.network == "inception" else f"fd_{self.network}": score}


@dataclass(frozen=True, kw_only=True)
class Kernel(Metric):
    """The kernel distance (Bińkowski et al. 2018): unbiased, so that few pictures will do.

    Args:
        network: whose features.
        subsets: over which it is averaged.
        subset_size: pictures in each; half of the smaller set where there are fewer.
    """

    network: str
    subsets: int = 100
    subset_size: int = 1000
    needs_reference = True

    def __call__(self, evidence: Evidence) -> dict[str, Score]:
        """The distance; its error is the subsets' spread, scaled from their size to the whole."""
        generated = evidence.generated[self.network]
        reference = evidence.reference[self.network]
        size = self._size(generated, reference)
        value, spread = self._distance(generated, reference, evidence.seed)
        error = spread * (size / min(len(generated), len(reference))) ** 0.5
        score = Score(
            value,
            error,
            around(value, error),
            len(generated),
            "lower",
            len(reference),
            **_of_real(evidence, self.network, lambda a, b: self._distance(a, b, evidence.seed)[0]),
            about={"subsets": self.subsets, "subset_size": size},
        )
        return {self.named("kid"): score}

    def _size(self, first: Tensor, second: Tensor) -> int:
        return min(self.subset_size, max(min(len(first), len(second)) // 2, 2))

    def _distance(self, first: Tensor, second: Tensor, seed: int) -> tuple[float, float]:
        metric = _quietly(
            KernelInceptionDistance,
            feature=_Given(),
            subsets=self.subsets,
            subset_size=self._size(first, second),
        )
        metric.update(second.double(), real=True)
        metric.update(first.double(), real=False)
        with _seeded(seed):  # it draws its subsets from the global generator
            mean, spread = metric.compute()
        return float(mean), float(spread)


@dataclass(frozen=True, kw_only=True)
class Cmmd(Metric):
    """CMMD (Jayasumana et al. 2024): maximum mean discrepancy of CLIP embeddings, times 1000.

    An RBF kernel of width 10 on unit vectors, the biased estimate.

    Args:
        network: whose embeddings; the paper's are ViT-L-14-336's.
        sigma: the kernel's width.
        resamples: of the bootstrap.
    """

    network: str
    sigma: float = 10.0
    resamples: int = 10
    needs_reference = True

    def __call__(self, evidence: Evidence) -> dict[str, Score]:
        """The discrepancy."""
        generated = evidence.generated[self.network]
        reference = evidence.reference[self.network]
        value = self._distance(generated, reference)
        generator = torch.Generator().manual_seed(evidence.seed)
        again = [
            self._distance(_resampled(generated, generator), _resampled(reference, generator))
            for _ in range(self.resamples)
        ]
        error = float(torch.tensor(again, dtype=torch.float64).std())
        score = Score(
            value,
            error,
            around(value, error),
            len(generated),
            "lower",
            len(reference),
            **_of_real(evidence, self.network, self._distance),
            about={"sigma": self.sigma, "scale": 1000},
        )
        return {f"cmmd_{self.network}": score}

    def _distance(self, first: Tensor, second: Tensor) -> float:
        first, second = (F.normalize(rows.double(), dim=-1) for rows in (first, second))
        within = self._kernel(first, first) + self._kernel(second, second)
        return 1000 * (within - 2 * self._kernel(first, second))

    def _kernel(self, first: Tensor, second: Tensor) -> float:
        """The mean of exp(-|a - b|² / 2σ²) over all pairs."""
        total = sum(
            float(torch.exp((rows @ second.T - 1) / self.sigma**2).sum())
            for rows in first.split(1024)
        )
        return total / (len(first) * len(second))


@dataclass(frozen=True, kw_only=True)
class Manifold(Metric):
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    A set's manifold is the union of balls about its pictures that reach to their `neighbours`-th
    neighbour. Generated pictures in the real manifold are precision, real ones in the generated
    manifold recall.

    Args:
        network: whose features.
        neighbours: k.
    """

    network: str
    neighbours: int = 3
    needs_reference = True

    def __call__(self, evidence: Evidence) -> dict[str, Score]:
        """The four shares."""
        generated = evidence.generated[self.network]
        reference = evidence.reference[self.network]
        rows = self._rows(generated, reference)
        real = evidence.real.get(self.network)
        reached = {} if real is None else self._rows(*real)
        scores = {}
        for word, values in rows.items():
            score = mean_score(
                values,
                seed=evidence.seed,
                better="higher",
                n_reference=len(reference),
                real=float(reached[word].mean()) if real is not None else None,
                n_real=None if real is None else len(real[0]),
                about={"neighbours": self.neighbours},
            )
            own = score.rows if len(values) == len(generated) and word == "precision" else None
            scores[self.named(word)] = score._replace(n=len(generated), rows=own)
        return scores

    def _rows(self, generated: Tensor, real: Tensor) -> dict[str, Float[Tensor, " rows"]]:
        """Precision and density of each generated picture, recall and coverage of each real one."""
        k = self.neighbours
        if min(len(generated), len(real)) <= k:
            raise ValueError(f"{k} neighbours need more than {k} pictures on both sides")
        real_radius, fake_radius = _radii(real, k), _radii(generated, k)
        precise, dense = [], []
        recalled = torch.zeros(len(real), dtype=torch.bool)
        covered = torch.zeros(len(real), dtype=torch.bool)
        for start in range(0, len(generated), 2048):
            part = slice(start, start + 2048)
            apart = torch.cdist(generated[part].double(), real.double())  # (part, real)
            inside = apart <= real_radius
            precise.append(inside.any(dim=1))
            dense.append(inside.sum(dim=1) / k)
            recalled |= (apart <= fake_radius[part, None]).any(dim=0)
            covered |= inside.any(dim=0)
        return {
            "precision": torch.cat(precise).double(),
            "recall": recalled.double(),
            "density": torch.cat(dense).double(),
            "coverage": covered.double(),
        }


@dataclass(frozen=True, kw_only=True)
class InceptionScore(Metric):
    """The Inception Score (Salimans et al. 2016) in 10 splits; it compares with nothing real."""

    network: str = "inception"
    splits: int = 10

    def __call__(self, evidence: Evidence) -> dict[str, Score]:
        """The mean over the splits; their spread is the error that papers give."""
        features = evidence.generated[self.network]
        if len(features) < 2 * self.splits:
            raise ValueError(f"{self.splits} splits need {2 * self.splits} pictures")
        metric = _quietly(TorchInceptionScore, feature=_Given(), splits=self.splits)
        metric.update(evidence.logits[self.network](features).double())
        with _seeded(evidence.seed):  # it shuffles by the global generator
            value, spread = (float(number) for number in metric.compute())
        score = Score(value, spread, around(value, spread), len(features), "higher")
        return {"inception_score": score._replace(about={"splits": self.splits})}


@dataclass(frozen=True, kw_only=True)
class ClipScore(Metric):
    """100 times the cosine of picture and caption: never of the CLIP that the model is built on.

    Not multiplied by 2.5, nothing put before the caption.

    Args:
        network: a CLIP.
    """

    network: str
    needs_prompts = True

    def __call__(self, evidence: Evidence) -> dict[str, Score]:
        """The mean, and the same of each prompt's real picture."""
        text = evidence.texts[self.network]
        paired = evidence.paired.get(self.network)
        score = mean_score(
            _cosines(evidence.generated[self.network], text),
            seed=evidence.seed,
            better="higher",
            real=None if paired is None else float(_cosines(paired, text).mean()),
            n_real=None if paired is None else len(paired),
            about={"scale": 100},
        )
        return {f"clip_score_{self.network}": score}


@dataclass(frozen=True, kw_only=True)
class RetrievalPrecision(Metric):
    """CLIP R-precision: how often a CLIP ranks the own caption first among `among` (Park 2021).

    The distractors are other prompts of the same evaluation, all different in their words.

    Args:
        network: a CLIP.
        among: captions to choose from; all different ones where there are fewer.
    """

    network: str
    among: int = 100
    needs_prompts = True

    def __call__(self, evidence: Evidence) -> dict[str, Score]:
        """The share, and the same of each prompt's real picture."""
        text, prompts = evidence.texts[self.network], evidence.prompts
        among = min(self.among, len(set(prompts)))
        if among < 2:
            raise ValueError("to choose a caption needs two different ones")
        others = distractors(prompts, count=among - 1, seed=evidence.seed)
        rows = torch.cat([torch.arange(len(prompts))[:, None], others], dim=1)  # (N, among)

        def hits(images: Tensor) -> Bool[Tensor, " n"]:
            unit = F.normalize(text, dim=-1)
            first = torch.zeros(1, dtype=torch.int64)
            parts = [
                choose(images[part], unit[rows[part]], first.expand(len(rows[part])))
                for part in (slice(at, at + 1024) for at in range(0, len(rows), 1024))
            ]
            return torch.cat(parts)

        paired = evidence.paired.get(self.network)
        score = mean_score(
            hits(evidence.generated[self.network]),
            seed=evidence.seed,
            better="higher",
            real=None if paired is None else float(hits(paired).double().mean()),
            n_real=None if paired is None else len(paired),
            about={"among": among},
        )
        return {f"r_precision_{self.network}": score}


def _frechet(first: Tensor, second: Tensor) -> float:
    return frechet_distance(fit_gaussian(first), fit_gaussian(second))


def _of_real(evidence: Evidence, network: str, distance) -> dict[str, float | int | None]:
    """A distance of real pictures from real pictures."""
    if (pair := evidence.real.get(network)) is None:
        return {"real": None, "n_real": None}
    return {"real": distance(*pair), "n_real": len(pair[0])}


def _cosines(images: Tensor, texts: Tensor) -> Float[Tensor, " n"]:
    """100 · cos."""
    return 100 * F.cosine_similarity(images.double(), texts.double(), dim=-1)


def _radii(rows: Tensor, neighbours: int) -> Float[Tensor, " rows"]:
    """The distance of each row to its k-th neighbour."""
    values = rows.double()
    parts = [
        torch.cdist(part, values).kthvalue(neighbours + 1, dim=1).values
        for part in values.split(2048)
    ]
    return torch.cat(parts)


def _resampled(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randint(len(rows), (len(rows),), generator=generator)]


def _quietly(metric: type, **settings):
    """A torchmetrics metric without its warning that it keeps features, which lie here anyway."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        return metric(sync_on_compute=False, **settings)  # rank 0 has all features


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generator seeded, and afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
