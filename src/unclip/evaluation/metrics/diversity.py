"""Fidelity and diversity: shares of images inside the other set's manifold."""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from unclip.evaluation.context import Context
from unclip.evaluation.features import Features
from unclip.evaluation.frechet import build_metric, seeded
from unclip.evaluation.measurement import Measurement, Result, Score, around, mean_score


class Manifold(Measurement):
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    A set's manifold is the union of balls around its images that reach to their k-th neighbor.
    Precision is the share of generated images in the real manifold, recall that of real images in
    the generated manifold.
    """

    network: str  # name of the feature network
    neighbors: int = 3  # k, the neighbor that a ball reaches to

    def __call__(self, context: Context) -> Result:
        """Compute the four shares."""
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


class InceptionScore(Measurement):
    """The Inception Score (Salimans et al. 2016); it compares with no real images."""

    network: str = "inception"  # name of a network with a classifier
    splits: int = 10  # number of splits, whose spread is the error that papers report

    def __call__(self, context: Context) -> Result:
        """Average the score over the splits."""
        from torchmetrics.image.inception import InceptionScore as TorchInceptionScore

        features = context.features(self.network)
        if len(features) < 2 * self.splits:
            raise ValueError(f"{self.splits} splits need {2 * self.splits} images")
        metric = build_metric(TorchInceptionScore, splits=self.splits)
        network = cast(Any, context.network(self.network))
        metric.update(network.logits(features).double())
        with seeded(context.seed):  # it shuffles with the global generator
            value, spread = (float(number) for number in metric.compute())
        interval, about = around(value, spread), {"splits": self.splits}
        score = Score(value, spread, interval, len(features), "higher", about=about)
        return Result({"inception_score": score})


def _radii(rows: Features, neighbors: int) -> Float[Tensor, " rows"]:
    """Return the distance of each row to its k-th neighbor."""
    values = rows.double()
    parts = [
        torch.cdist(part, values).kthvalue(neighbors + 1, dim=1).values
        for part in values.split(1024)
    ]
    return torch.cat(parts)
