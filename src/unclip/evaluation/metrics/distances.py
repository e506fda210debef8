"""Distances between two sets of features."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.image.kid import KernelInceptionDistance

from unclip.evaluation.frechet import bootstrap_error, fit_gaussian, frechet_distance
from unclip.evaluation.metrics.peers import Given, made, seeded
from unclip.evaluation.scores import Evidence, Metric, Score, around


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
        """The distance, and its error.

        Subsets of m among the same n rows vary as the whole would, but for a factor: drawn without
        replacement, their variance is that of a mean over all rows times (n - m) / m.
        """
        generated = evidence.generated[self.network]
        reference = evidence.reference[self.network]
        size = self._size(generated, reference)
        value, spread = self._distance(generated, reference, evidence.seed)
        left = min(len(generated), len(reference)) - size
        error = spread * (size / max(left, 1)) ** 0.5
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
        metric = made(
            KernelInceptionDistance,
            feature=Given(),
            subsets=self.subsets,
            subset_size=self._size(first, second),
        )
        metric.update(second.double(), real=True)
        metric.update(first.double(), real=False)
        with seeded(seed):  # it draws its subsets from the global generator
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


def _frechet(first: Tensor, second: Tensor) -> float:
    return frechet_distance(fit_gaussian(first), fit_gaussian(second))


def _of_real(
    evidence: Evidence, network: str, distance: Callable[[Tensor, Tensor], float]
) -> dict[str, float | int | None]:
    """A distance of real pictures from real pictures."""
    if (pair := evidence.real.get(network)) is None:
        return {"real": None, "n_real": None}
    return {"real": distance(*pair), "n_real": len(pair[0])}


def _resampled(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randint(len(rows), (len(rows),), generator=generator)]
