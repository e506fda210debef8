"""What a metric is: features in, named scores out, each with its error and its like for real."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Z95 = 1.96


class Score(NamedTuple):
    """One number and how far to trust it.

    Attributes:
        value: the number.
        error: its standard error by the bootstrap.
        interval: 95%.
        n: generated pictures.
        better: "lower" or "higher".
        n_reference: real pictures that they are compared with; None where there are none.
        real: the same number of real pictures in the place of generated ones: of a distance the
            floor, of a score of agreement what real pictures reach; None where it is not known.
        n_real: how many these were.
        rows: the number of each picture, where it is a mean of such.
        about: settings that belong to it.
    """

    value: float
    error: float | None
    interval: tuple[float, float] | None
    n: int
    better: str
    n_reference: int | None = None
    real: float | None = None
    n_real: int | None = None
    rows: Tensor | None = None
    about: Mapping[str, Any] = {}

    def plain(self) -> dict[str, Any]:
        """For JSON: everything but the rows."""
        values = self._asdict()
        del values["rows"]
        values["interval"] = None if self.interval is None else list(self.interval)
        return {**values, "about": dict(self.about)}


class Pictures(NamedTuple):
    """Pictures that are decoded when they are asked for.

    Attributes:
        count: how many there are.
        load: some of them, given their indices in ascending order: uint8 `N 3 size size`.
    """

    count: int
    load: Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class Evidence:
    """What the metrics see: features by network, rows in the order of the prompts.

    Args:
        generated: features of the generated pictures.
        reference: of the reference set.
        real: real pictures and what they are compared with, no picture on both sides.
        paired: the real picture of each prompt; empty where that is not known.
        texts: the prompts' embeddings, by CLIP; empty where there are no prompts.
        prompts: the prompts themselves.
        about: what the source says of each prompt's scene, such as its objects.
        pictures: the generated pictures themselves.
        logits: classifiers of features, by network.
        seed: of everything that is drawn.
    """

    generated: Mapping[str, Float[Tensor, "n features"]]
    reference: Mapping[str, Float[Tensor, "m features"]]
    real: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    paired: Mapping[str, Float[Tensor, "n features"]] = field(default_factory=dict)
    texts: Mapping[str, Float[Tensor, "n features"]] = field(default_factory=dict)
    prompts: list[str] | None = None
    about: list[Mapping[str, Any]] | None = None
    pictures: Pictures | None = None
    logits: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    seed: int = 0


class Metric(ABC):
    """One measure: in one network's features, or of the pictures themselves.

    A new one is a subclass and an entry in conf/metrics.

    Attributes:
        network: the name of a `FeatureNetwork`; None for a measure that looks at the pictures.
        needs_prompts: whether it asks what the pictures should show.
        needs_reference: whether it compares features with those of a reference set.
    """

    network: str | None = None
    needs_prompts = False
    needs_reference = False

    @abstractmethod
    def __call__(self, evidence: Evidence) -> dict[str, Score]:
        """Its scores by name.

        Raises:
            ValueError: there are too few pictures for it.
        """

    def named(self, word: str) -> str:
        """A score's name: only in Inception's features does it go by the word alone."""
        return word if self.network == "inception" else f"{word}_{self.network}"


def mean_score(
    rows: Float[Tensor, " n"],
    *,
    seed: int,
    resamples: int = 1000,
    **about: Any,
) -> Score:
    """The mean of a number that each picture has, with its percentile bootstrap interval."""
    values = rows.double()
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [
            values[torch.randint(len(values), (len(values),), generator=generator)].mean()
            for _ in range(resamples)
        ]
    )
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Score(
        value=float(values.mean()),
        error=float(means.std()),
        interval=(low, high),
        n=len(values),
        rows=values,
        **about,
    )


def around(value: float, error: float) -> tuple[float, float]:
    """The interval of a number whose error is normal."""
    return value - Z95 * error, value + Z95 * error
