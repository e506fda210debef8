"""A measurement maps a context to a result; `run` is the one loop over all of them.

A new number is a subclass of `Measurement` and an entry in conf/measure.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, dataclass_transform

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unclip.evaluation.context import Context
from unclip.evaluation.distributed import Ranks
from unclip.evaluation.frechet import resample
from unclip.evaluation.generation import require_stages
from unclip.text_to_image import stage_of_prior

Z95 = 1.96  # standard errors in half a 95% interval
INTERVAL = torch.tensor([0.025, 0.975], dtype=torch.float64)  # quantiles of a 95% interval

Numbers = dict[str, Any]


class Score(NamedTuple):
    """A number and its uncertainty."""

    value: float
    error: float | None  # standard error, by the bootstrap
    interval: tuple[float, float] | None  # of 95%
    n: int  # number of generated images
    better: str  # "lower", "higher" or "nearest 0"
    n_reference: int | None = None  # number of real images that they are compared with
    # the same number with real images in place of the generated ones: the floor of a distance, the
    # ceiling of an agreement
    baseline: float | None = None
    n_real: int | None = None  # number of images behind `baseline`
    rows: Tensor | None = None  # the number of each image if the score is their mean
    about: Mapping[str, Any] = {}  # settings that belong to the number

    def plain(self) -> Numbers:
        """Return the score for results.json, without its rows."""
        values = self._asdict()
        del values["rows"]
        return {"real": values.pop("baseline"), **values, "about": dict(self.about)}


class Table(NamedTuple):
    """Rows of text, numbers and None under a head."""

    head: list[str]
    rows: list[list[Any]]

    @classmethod
    def of(cls, first: str, found: Mapping[str, Any], columns: Mapping[str, str]) -> Self:
        """Return a row for each name, with None where a number is unknown.

        Columns are headings by key; "a/b" is the key "b" of the numbers at "a".
        """

        def look_up(numbers: Any, key: str) -> Any:
            for part in key.split("/"):
                numbers = (numbers or {}).get(part)
            return numbers

        rows = [[name, *(look_up(one, key) for key in columns)] for name, one in found.items()]
        return cls([first, *columns.values()], rows)


@dataclass
class Result:
    """The outcome of one measurement."""

    scores: dict[str, Score] = field(default_factory=dict)  # of the protocol's images
    tables: dict[str, Table] = field(default_factory=dict)  # tables by title, for the report
    # images by file stem, written to OUT/images/STEM.png. A stem with a folder, such as
    # "held_out_256/0", is not shown in the report.
    images: Mapping[str, Image.Image | Path] = field(default_factory=dict)
    values: Numbers = field(default_factory=dict)  # merged into results.json key by key
    note: str = ""  # a sentence or two for the report, about how to read the numbers
    title: str = ""  # heading in the report, which `run` sets


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Measurement(ABC):
    """One or more numbers, tables or images about a bundle or about a folder of images.

    Every subclass is a frozen dataclass; its fields are the keys in conf/measure. Its `__call__`
    raises FileNotFoundError if a package or data are missing, with the way to get them, and
    ValueError if the data do not fit or there are too few images.
    """

    title: ClassVar[str] = ""  # heading in the report
    # stages that the bundle needs, "prior" for the prior of the settings; () for a measurement of
    # any folder of images
    stages: ClassVar[tuple[str, ...]] = ()
    # feature network that it applies to the protocol's images; all ranks share the work
    network: ClassVar[str | None] = None

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    @abstractmethod
    def __call__(self, context: Context) -> Result: ...


@dataclass
class Results:
    """What all measurements found; only rank 0 has one."""

    results: dict[str, Result] = field(default_factory=dict)  # by the measurement's name
    not_available: dict[str, str] = field(default_factory=dict)  # reasons why there is no result
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, Score]:
        """All scores by name."""
        return {k: score for one in self.results.values() for k, score in one.scores.items()}


def run(measurements: Mapping[str, Measurement], context: Context) -> Results | None:
    """Run all measurements; one that lacks something is listed with the reason.

    The context's ranks share the protocol's images and their features; then rank 0 continues alone.

    Raises:
        ValueError: a measurement names a network that has no constructor, or an image is damaged.
    """
    found, started = Results(), time.perf_counter()
    for network in dict.fromkeys(one.network for one in measurements.values() if one.network):
        context.gather_features(network)
    found.seconds["features"] = time.perf_counter() - started
    if not context.ranks.first:
        return None
    context.ranks = Ranks()
    for name, measurement in measurements.items():
        started = time.perf_counter()
        try:
            result = _measure(measurement, context)
        except (FileNotFoundError, ValueError) as error:
            found.not_available[name] = str(error)
            continue
        result.title = measurement.title or name
        found.results[name] = result
        found.seconds[name] = time.perf_counter() - started
        if context.settings.progress:
            tqdm.write(f"measured: {name} ({found.seconds[name]:.1f} s)")
    return found


def _measure(measurement: Measurement, context: Context) -> Result:
    """Check that the bundle has the stages, measure, and add the network to the scores."""
    if measurement.stages:
        prior = stage_of_prior(context.settings.prior)
        needed = (prior if stage == "prior" else stage for stage in measurement.stages)
        require_stages(context.cascade, needed)
    result = measurement(context)
    if measurement.network is not None:
        about = {"network": context.network(measurement.network).fingerprint}
        for key, score in result.scores.items():
            result.scores[key] = score._replace(about={**score.about, **about})
    return result


def mean_score(
    rows: Float[Tensor, " n"],
    *,
    seed: int,
    real: Float[Tensor, " m"] | None = None,
    **others: Any,
) -> Score:
    """Average a number that each image has, with its percentile bootstrap interval.

    The baseline is the mean over `real` images; `others` are other fields of the score.
    """
    values, generator = rows.double(), torch.Generator().manual_seed(seed)
    means = torch.stack([resample(values, generator).mean() for _ in range(1000)])
    low, high = means.quantile(INTERVAL).tolist()
    return Score(
        value=float(values.mean()),
        error=float(means.std()),
        interval=(low, high),
        n=len(values),
        better="higher",
        baseline=None if real is None else float(real.double().mean()),
        n_real=None if real is None else len(real),
        rows=values,
        **others,
    )


def around(value: float, error: float) -> tuple[float, float]:
    """Return the 95% interval of a number with a normal error."""
    return value - Z95 * error, value + Z95 * error
