"""Distances between two sets of features."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.evaluation.context import Context
from unclip.evaluation.frechet import bootstrap_error, frechet
from unclip.evaluation.measurement import Measurement, Result, Score, around
from unclip.evaluation.metrics.torchmetrics_adapter import build_metric, seeded


@dataclass(frozen=True, kw_only=True)
class Frechet(Measurement):
    """The Fréchet distance (Heusel et al. 2017): `fid` in Inception's features, else `fd_NETWORK`.

    Args:
        network: name of the feature network.
        resamples: number of bootstrap resamples.
    """

    network: str
    resamples: int = 10

    def __call__(self, context: Context) -> Result:
        """Compute the distance to the reference images."""
        generated = context.features(self.network)
        reference = context.features(self.network, "reference")
        error = bootstrap_error(generated, reference, resamples=self.resamples, seed=context.seed)
        value = frechet(generated, reference)
        score = _score(context, self.network, value, error, frechet)
        return Result({"fid" if self.network == "inception" else f"fd_{self.network}": score})


@dataclass(frozen=True, kw_only=True)
class Kernel(Measurement):
    """The kernel distance (Bińkowski et al. 2018), which is unbiased also for few images.

    Args:
        network: name of the feature network.
        subsets: number of subsets that it is averaged over.
        subset_size: number of images in each; half of the smaller set if that is less.
    """

    network: str
    subsets: int = 100
    subset_size: int = 1000

    def __call__(self, context: Context) -> Result:
        """Compute the distance to the reference images.

        Subsets of m among the same n rows vary as the whole does, up to a factor: drawn without
        replacement, their variance is that of a mean over all rows times (n - m) / m.
        """
        generated = context.features(self.network)
        reference = context.features(self.network, "reference")
        distance = partial(
            kernel_distance,
            subsets=self.subsets,
            subset_size=self.subset_size,
            seed=context.seed,
        )
        value, spread = distance(generated, reference)
        size = _subset_size(generated, reference, self.subset_size)
        left = min(len(generated), len(reference)) - size
        error = spread * (size / max(left, 1)) ** 0.5
        about = {"subsets": self.subsets, "subset_size": size}
        score = _score(context, self.network, value, error, lambda *pair: distance(*pair)[0], about)
        name = "kid" if self.network == "inception" else f"kid_{self.network}"
        return Result({name: score})


@dataclass(frozen=True, kw_only=True)
class Cmmd(Measurement):
    """CMMD (Jayasumana et al. 2024): maximum mean discrepancy of CLIP embeddings, times 1000.

    It is the biased estimate with an RBF kernel of width 10 on unit vectors.

    Args:
        network: name of the network; the paper's is ViT-L-14-336.
        sigma: width of the kernel.
        resamples: number of bootstrap resamples.
    """

    network: str
    sigma: float = 10.0
    resamples: int = 10

    def __call__(self, context: Context) -> Result:
        """Compute the discrepancy from the reference images."""
        generated = context.features(self.network)
        reference = context.features(self.network, "reference")
        options = {"distance": self._distance, "resamples": self.resamples, "seed": context.seed}
        error = bootstrap_error(generated, reference, **options)
        value = self._distance(generated, reference)
        about = {"sigma": self.sigma, "scale": 1000}
        score = _score(context, self.network, value, error, self._distance, about)
        return Result({f"cmmd_{self.network}": score})

    def _distance(self, first: Tensor, second: Tensor) -> float:
        first, second = (F.normalize(rows.double(), dim=-1) for rows in (first, second))
        within = self._kernel(first, first) + self._kernel(second, second)
        return 1000 * (within - 2 * self._kernel(first, second))

    def _kernel(self, first: Tensor, second: Tensor) -> float:
        """Average exp(-|a - b|² / 2σ²) over all pairs."""
        total = sum(
            float(torch.exp((rows @ second.T - 1) / self.sigma**2).sum())
            for rows in first.split(1024)
        )
        return total / (len(first) * len(second))


def kernel_distance(
    first: Tensor, second: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int
) -> tuple[float, float]:
    """Compute the mean kernel distance over random subsets, and its spread.

    Args:
        first: features, one row per image.
        second: features to compare with.
        subsets: number of subsets.
        subset_size: number of images in each; half of the smaller set if that is less.
        seed: seed of the subsets.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = _subset_size(first, second, subset_size)
    metric = build_metric(KernelInceptionDistance, subsets=subsets, subset_size=size)
    metric.update(second.double(), real=True)
    metric.update(first.double(), real=False)
    with seeded(seed):  # it draws its subsets from the global generator
        mean, spread = metric.compute()
    return float(mean), float(spread)


def _subset_size(first: Tensor, second: Tensor, most: int) -> int:
    return min(most, max(min(len(first), len(second)) // 2, 2))


def _score(
    context: Context,
    network: str,
    value: float,
    error: float,
    distance: Callable[[Tensor, Tensor], float],
    about: dict[str, Any] | None = None,
) -> Score:
    """Return a distance with that of real images as its baseline."""
    pair = context.real_pair(network)
    return Score(
        value,
        error,
        around(value, error),
        len(context.features(network)),
        "lower",
        len(context.features(network, "reference")),
        baseline=None if pair is None else distance(*pair),
        n_real=None if pair is None else len(pair[0]),
        about=about or {},
    )
