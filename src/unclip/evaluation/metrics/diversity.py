"""Fidelity and diversity apart: shares of the pictures that lie in the other set's manifold."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.image.inception import InceptionScore as TorchInceptionScore

from unclip.evaluation.metrics.peers import Given, made, seeded
from unclip.evaluation.scores import Evidence, Metric, Score, around, mean_score


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
        for start in range(0, len(generated), 1024):
            part = slice(start, start + 1024)
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
        metric = made(TorchInceptionScore, feature=Given(), splits=self.splits)
        metric.update(evidence.logits[self.network](features).double())
        with seeded(evidence.seed):  # it shuffles by the global generator
            value, spread = (float(number) for number in metric.compute())
        score = Score(value, spread, around(value, spread), len(features), "higher")
        return {"inception_score": score._replace(about={"splits": self.splits})}


def _radii(rows: Tensor, neighbours: int) -> Float[Tensor, " rows"]:
    """The distance of each row to its k-th neighbour."""
    values = rows.double()
    parts = [
        torch.cdist(part, values).kthvalue(neighbours + 1, dim=1).values
        for part in values.split(1024)
    ]
    return torch.cat(parts)
