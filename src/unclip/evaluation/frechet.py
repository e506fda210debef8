"""Fréchet and kernel distances between two sets of features in float64, and their bootstrap."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from unclip.evaluation.features import Features


class Gaussian(NamedTuple):
    """The first two moments of a set of features."""

    mean: Float64[Tensor, " features"]
    covariance: Float64[Tensor, "features features"]  # divided by count - 1


def fit_gaussian(features: Features) -> Gaussian:
    """Compute mean and covariance in float64 on the CPU."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 rows of features: {list(features.shape)}")
    values = features.detach().cpu().double()
    if not values.isfinite().all():
        raise ValueError("a feature is not finite: the images or the network are broken")
    mean = values.mean(dim=0)
    centered = values - mean
    return Gaussian(mean, centered.T @ centered / (len(values) - 1))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Compute |m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½) (Dowson & Landau 1982), at least 0.

    The trace of (S1 S2)^½ is computed from the symmetric S1^½ S2 S1^½, which has the same
    eigenvalues and can neither become complex nor fail if fewer samples than features make S1
    singular.
    """
    values, vectors = torch.linalg.eigh(first.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # S1^½
    product = root @ second.covariance @ root
    overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    shift = (first.mean - second.mean).square().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    return max(float(shift + traces - 2 * overlap), 0.0)


def frechet(first: Features, second: Features) -> float:
    """Compute the Fréchet distance between two sets of features."""
    return frechet_distance(fit_gaussian(first), fit_gaussian(second))


def bootstrap_error(
    first: Features,
    second: Features,
    *,
    distance: Callable[[Tensor, Tensor], float] = frechet,
    resamples: int,
    seed: int = 0,
) -> float:
    """Compute the standard deviation of a distance over bootstrap resamples of both sets.

    Repeated rows add to the distance's own bias, so percentiles would be above the distance.
    """
    generator = torch.Generator().manual_seed(seed)
    distances = [
        distance(resample(first, generator), resample(second, generator)) for _ in range(resamples)
    ]
    return float(torch.tensor(distances, dtype=torch.float64).std())


def resample(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Choose as many rows as there are, with replacement."""
    return rows[torch.randint(len(rows), (len(rows),), generator=generator)]


def kernel_distance(
    first: Features, second: Features, *, subsets: int = 100, subset_size: int = 1000, seed: int
) -> tuple[float, float]:
    """Compute the mean kernel distance over random subsets, and its spread."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = subset_size_of(min(len(first), len(second)), subset_size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        settings = {"subsets": subsets, "subset_size": size, "sync_on_compute": False}
        metric = KernelInceptionDistance(nn.Identity(), **settings)
    metric.update(second.double(), real=True)
    metric.update(first.double(), real=False)
    with seeded(seed):  # it draws its subsets from the global generator
        mean, spread = metric.compute()
    return float(mean), float(spread)


def subset_size_of(count: int, most: int) -> int:
    """Return `most`, or half of `count` if that is less, but at least 2."""
    return min(most, max(count // 2, 2))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generator, and restore it on exit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
