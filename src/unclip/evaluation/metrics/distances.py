"""Distances between two sets of features."""

from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from unclip.evaluation.context import Context
from unclip.evaluation.features import Features
from unclip.evaluation.frechet import bootstrap_error, frechet, kernel_distance, subset_size_of
from unclip.evaluation.measurement import Measurement, Result, Score, around

_PAPERS_NAMES = {"fd_inception": "fid", "kid_inception": "kid"}


class Distance(Measurement):
    """A distance of the generated images' features to those of the reference images."""

    network: str  # name of the feature network
    prefix: ClassVar[str]  # name of the score, to which the network's name is added
    resamples: ClassVar[int]  # number of bootstrap resamples

    def __call__(self, context: Context) -> Result:
        """Compute the distance; its baseline is that between two sets of real images."""
        generated = context.features(self.network)
        reference = context.reference_features(self.network)
        value, error = self.compare(generated, reference, context.seed)
        pair = context.real_pair(self.network)
        score = Score(
            value,
            error,
            around(value, error),
            len(generated),
            "lower",
            len(reference),
            baseline=None if pair is None else self.distance(*pair, context.seed),
            n_real=None if pair is None else len(pair[0]),
            about=self.about(min(len(generated), len(reference))),
        )
        name = f"{self.prefix}_{self.network}"
        return Result({_PAPERS_NAMES.get(name, name): score})

    @abstractmethod
    def distance(self, first: Features, second: Features, seed: int) -> float:
        """Compute the distance between two sets of features."""

    def compare(self, first: Features, second: Features, seed: int) -> tuple[float, float]:
        """Compute the distance and its standard error, by default by the bootstrap."""
        options = {"resamples": self.resamples, "seed": seed}
        distance = partial(self.distance, seed=seed)
        error = bootstrap_error(first, second, distance=distance, **options)
        return distance(first, second), error

    def about(self, count: int) -> dict[str, Any]:
        """Return the settings that belong to the distance between sets of `count` images."""
        return {}


class Frechet(Distance):
    """The Fréchet distance (Heusel et al. 2017), called `fid` only in Inception's features."""

    resamples: int = 10  # number of bootstrap resamples
    prefix = "fd"

    def distance(self, first: Features, second: Features, seed: int) -> float:
        """Compute the distance between the sets' Gaussians."""
        return frechet(first, second)


class Kernel(Distance):
    """The kernel distance (Bińkowski et al. 2018), which is unbiased also for few images."""

    subsets: int = 100  # number of subsets that it is averaged over
    subset_size: int = 1000  # number of images in each; half of the smaller set if that is less
    prefix = "kid"

    def distance(self, first: Features, second: Features, seed: int) -> float:
        """Average the distance over the subsets."""
        return self.compare(first, second, seed)[0]

    def compare(self, first: Features, second: Features, seed: int) -> tuple[float, float]:
        """Average the distance over the subsets, and derive its error from their spread.

        Subsets of m among the same n rows vary as the whole does, up to a factor: drawn without
        replacement, their variance is that of a mean over all rows times (n - m) / m.
        """
        options = {"subsets": self.subsets, "subset_size": self.subset_size}
        mean, spread = kernel_distance(first, second, **options, seed=seed)
        count = min(len(first), len(second))
        size = subset_size_of(count, self.subset_size)
        return mean, spread * (size / max(count - size, 1)) ** 0.5

    def about(self, count: int) -> dict[str, Any]:
        """Return number and size of the subsets."""
        return {"subsets": self.subsets, "subset_size": subset_size_of(count, self.subset_size)}


class Cmmd(Distance):
    """CMMD (Jayasumana et al. 2024): maximum mean discrepancy of CLIP embeddings, times 1000.

    It is the biased estimate with an RBF kernel of width 10 on unit vectors. The paper's network is
    ViT-L-14-336.
    """

    sigma: float = 10.0  # width of the kernel
    resamples: int = 10  # number of bootstrap resamples
    prefix = "cmmd"

    def distance(self, first: Features, second: Features, seed: int) -> float:
        """Compute the discrepancy between the sets' unit vectors."""
        first, second = (F.normalize(rows.double(), dim=-1) for rows in (first, second))
        within = self._kernel(first, first) + self._kernel(second, second)
        return 1000 * (within - 2 * self._kernel(first, second))

    def about(self, count: int) -> dict[str, Any]:
        """Return the kernel's width and the factor."""
        return {"sigma": self.sigma, "scale": 1000}

    def _kernel(self, first: Features, second: Features) -> float:
        """Average exp(-|a - b|² / 2σ²) over all pairs."""
        total = sum(
            float(torch.exp((rows @ second.T - 1) / self.sigma**2).sum())
            for rows in first.split(1024)
        )
        return total / (len(first) * len(second))
