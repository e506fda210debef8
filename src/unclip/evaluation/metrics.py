"""Metrics of the protocol's images: distances, diversity, and agreement with the caption."""

from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unclip.evaluation.choices import choose_own
from unclip.evaluation.context import Context
from unclip.evaluation.features import Features
from unclip.evaluation.frechet import bootstrap_error, frechet, kernel_distance, subset_size_of
from unclip.evaluation.measurement import Measurement, Result, Score, around, mean_score

_PAPERS_NAMES = {"fd_inception": "fid", "kid_inception": "kid"}


class Distance(Measurement):
    """A distance of the generated images' features to those of the reference images.

    Its baseline is the distance between two sets of real images.
    """

    network: str  # name of the feature network
    prefix: ClassVar[str]  # name of the score, to which the network's name is added
    resamples: ClassVar[int]  # number of bootstrap resamples

    def __call__(self, context: Context) -> Result:
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
        distance, resamples = partial(self.distance, seed=seed), self.resamples
        error = bootstrap_error(first, second, distance=distance, resamples=resamples, seed=seed)
        return distance(first, second), error

    def about(self, count: int) -> dict[str, Any]:
        """Return the settings that belong to the distance between sets of `count` images."""
        return {}


class Frechet(Distance):
    """The Fréchet distance (Heusel et al. 2017), called `fid` only in Inception's features."""

    resamples: int = 10  # number of bootstrap resamples
    prefix = "fd"

    def distance(self, first: Features, second: Features, seed: int) -> float:
        return frechet(first, second)


class Kernel(Distance):
    """The kernel distance (Bińkowski et al. 2018), which is unbiased also for few images."""

    subsets: int = 100  # number of subsets that it is averaged over
    subset_size: int = 1000  # number of images in each; half of the smaller set if that is less
    prefix = "kid"

    def distance(self, first: Features, second: Features, seed: int) -> float:
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
        """Average exp(-|a - b|² / 2σ²) over pairs within and between the sets."""
        first, second = (F.normalize(rows.double(), dim=-1) for rows in (first, second))

        def kernel(first: Features, second: Features) -> float:
            cosines = (rows @ second.T for rows in first.split(1024))
            total = sum(float(torch.exp((each - 1) / self.sigma**2).sum()) for each in cosines)
            return total / (len(first) * len(second))

        return 1000 * (kernel(first, first) + kernel(second, second) - 2 * kernel(first, second))

    def about(self, count: int) -> dict[str, Any]:
        return {"sigma": self.sigma, "scale": 1000}


class Manifold(Measurement):
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    A set's manifold is the union of balls around its images that reach to their k-th neighbor.
    Precision is the share of generated images in the real manifold, recall that of real images in
    the generated manifold.
    """

    network: str  # name of the feature network
    neighbors: int = 3  # k, the neighbor that a ball reaches to

    def __call__(self, context: Context) -> Result:
        generated = context.features(self.network)
        reference = context.reference_features(self.network)
        pair = context.real_pair(self.network)
        real = {} if pair is None else self._rows(*pair)
        scores: dict[str, Score] = {}
        for word, values in self._rows(generated, reference).items():
            score = mean_score(
                values,
                seed=context.seed,
                real=real.get(word),
                n_reference=len(reference),
                about={"neighbours": self.neighbors},
            )
            name = word if self.network == "inception" else f"{word}_{self.network}"
            scores[name] = score._replace(
                n=len(generated),
                n_real=None if pair is None else len(pair[0]),
                rows=score.rows if word == "precision" else None,
            )
        return Result(scores)

    def _rows(self, generated: Features, real: Features) -> dict[str, Float[Tensor, " rows"]]:
        """Compute precision and density of generated images, recall and coverage of real ones."""
        k = self.neighbors
        if min(len(generated), len(real)) <= k:
            raise ValueError(f"{k} neighbors need more than {k} images on both sides")
        real_radius, generated_radius = _radii(real, k), _radii(generated, k)
        precise, dense = [], []
        recalled, covered = torch.zeros(2, len(real), dtype=torch.bool)
        batches = zip(generated.double().split(1024), generated_radius.split(1024), strict=True)
        for batch, radius in batches:
            distance = torch.cdist(batch, real.double())  # (batch, real)
            inside = distance <= real_radius
            precise.append(inside.any(dim=1))
            dense.append(inside.sum(dim=1) / k)
            recalled |= (distance <= radius[:, None]).any(dim=0)
            covered |= inside.any(dim=0)
        return {
            "precision": torch.cat(precise).double(),
            "recall": recalled.double(),
            "density": torch.cat(dense).double(),
            "coverage": covered.double(),
        }


def _radii(rows: Features, neighbors: int) -> Float[Tensor, " rows"]:
    """Return the distance of each row to its k-th neighbor."""
    values, k = rows.double(), neighbors + 1  # a row is its own nearest
    distances = (torch.cdist(part, values) for part in values.split(1024))
    return torch.cat([distance.kthvalue(k, dim=1).values for distance in distances])


class ClipScore(Measurement):
    """100 times the cosine of image and caption, by a CLIP that the model is not built on.

    It is not multiplied by 2.5, and captions get no prefix. The baseline is the score of each
    prompt's real image.
    """

    network: str  # name of a CLIP network

    def __call__(self, context: Context) -> Result:
        texts = context.texts(self.network)

        def cosines(images: Features) -> Float[Tensor, " n"]:
            return 100 * F.cosine_similarity(images.double(), texts.double(), dim=-1)

        ours, paired = context.features(self.network), context.paired_features(self.network)
        real, about = None if paired is None else cosines(paired), {"scale": 100}
        score = mean_score(cosines(ours), seed=context.seed, real=real, about=about)
        return Result({f"clip_score_{self.network}": score})


class RetrievalPrecision(Measurement):
    """CLIP R-precision: how often a CLIP ranks the own caption first (Park 2021).

    The distractors are other prompts of the same evaluation with different texts. The baseline is
    the share of each prompt's real image.
    """

    network: str  # name of a CLIP network
    among: int = 100  # number of captions to choose from; all different ones if there are fewer

    def __call__(self, context: Context) -> Result:
        texts, prompts = F.normalize(context.texts(self.network), dim=-1), context.prompts
        among = min(self.among, len(set(prompts)))
        if among < 2:
            raise ValueError("a choice needs at least two different captions")
        options: dict[str, int] = {"among": among, "seed": context.seed}
        paired = context.paired_features(self.network)
        score = mean_score(
            choose_own(context.features(self.network), texts, prompts, **options),
            seed=context.seed,
            real=None if paired is None else choose_own(paired, texts, prompts, **options),
            about={"among": among},
        )
        return Result({f"r_precision_{self.network}": score})
