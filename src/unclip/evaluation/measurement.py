"""A measurement maps a context to a result; `run` is the one loop over all of them.

A new number is a subclass of `Measurement` in a file of its own and an entry in conf/measure.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unclip.evaluation.context import Context
from unclip.evaluation.distributed import Ranks
from unclip.evaluation.generation import require_stages
from unclip.text_to_image import stage_of_prior

Z95 = 1.96  # standard errors in half a 95% interval


class Score(NamedTuple):
    """A number and its uncertainty.

    Attributes:
        value: the number.
        error: its standard error, by the bootstrap.
        interval: its 95% interval.
        n: number of generated images.
        better: "lower", "higher" or "nearest 0".
        n_reference: number of real images they are compared with; None if there are none.
        baseline: the same number with real images in place of the generated ones: the floor of a
            distance, the ceiling of an agreement; None if unknown.
        n_real: number of images behind `baseline`.
        rows: the number of each image if the score is their mean.
        about: settings that belong to the number.
    """

    value: float
    error: float | None
    interval: tuple[float, float] | None
    n: int
    better: str
    n_reference: int | None = None
    baseline: float | None = None
    n_real: int | None = None
    rows: Tensor | None = None
    about: Mapping[str, Any] = {}

    def plain(self) -> dict[str, Any]:
        """Return the score for results.json, without its rows."""
        values = self._asdict()
        del values["rows"]
        values["real"] = values.pop("baseline")
        values["interval"] = None if self.interval is None else list(self.interval)
        return {**values, "about": dict(self.about)}


class Table(NamedTuple):
    """Rows of text, numbers and None under a head."""

    head: list[str]
    rows: list[list[Any]]


@dataclass
class Result:
    """The outcome of one measurement.

    Attributes:
        scores: scores of the protocol's images by name.
        tables: tables by title, for the report.
        images: Pillow images by file stem, written to OUT/images/STEM.png. A stem with a folder,
            such as "held_out_256/0", is written and not shown in the report.
        values: plain numbers, merged into results.json key by key.
        note: a sentence or two for the report, about how to read the numbers.
    """

    scores: dict[str, Score] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    images: dict[str, Image.Image | Path] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    note: str = ""


class Measurement(ABC):
    """One or more numbers, tables or images about a bundle or about a folder of images.

    Subclasses are frozen dataclasses; their fields are the keys in conf/measure.

    Attributes:
        title: heading in the report.
        stages: stages that the bundle needs, "prior" for the prior of the settings; () for a
            measurement of any folder of images.
        network: name of the feature network whose features of the protocol's images it uses. Its
            features are computed by all ranks together.
    """

    title: ClassVar[str] = ""
    stages: ClassVar[tuple[str, ...]] = ()
    network: str | None = None

    @abstractmethod
    def __call__(self, context: Context) -> Result:
        """Measure.

        Raises:
            FileNotFoundError: a stage, a package or data is missing; the message says how to get
                it.
            ValueError: the data do not fit, or there are too few images.
        """


@dataclass
class Results:
    """What all measurements found; only rank 0 has one.

    Attributes:
        results: results by the measurement's name in the configuration.
        not_available: the reason why a measurement has no result, by its name.
        seconds: duration of each measurement.
    """

    results: dict[str, Result] = field(default_factory=dict)
    not_available: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, Score]:
        """All scores by name."""
        return {k: score for one in self.results.values() for k, score in one.scores.items()}


def run(measurements: Mapping[str, Measurement | None], context: Context) -> Results | None:
    """Run all measurements; one that lacks something is listed with the reason.

    Args:
        measurements: by name; None leaves one out.
        context: what is measured. Its ranks share the protocol's images and their features; then
            rank 0 continues alone.

    Raises:
        ValueError: a measurement names a network that has no constructor, or an image is damaged.
    """
    chosen = {name: one for name, one in measurements.items() if one is not None}
    found, started = Results(), time.perf_counter()
    for network in dict.fromkeys(one.network for one in chosen.values() if one.network):
        context.gather_features(network)
    found.seconds["features"] = time.perf_counter() - started
    if not context.ranks.first:
        return None
    context.ranks = Ranks()
    for name, measurement in chosen.items():
        started = time.perf_counter()
        try:
            _check_stages(measurement, context)
            result = measurement(context)
        except (FileNotFoundError, ValueError) as error:
            found.not_available[name] = str(error)
            continue
        if measurement.network is not None:
            about = {"network": context.network(measurement.network).fingerprint}
            for key, score in result.scores.items():
                result.scores[key] = score._replace(about={**score.about, **about})
        found.results[name] = result
        found.seconds[name] = time.perf_counter() - started
        if context.settings.progress:
            tqdm.write(f"measured: {name} ({found.seconds[name]:.1f} s)")
    return found


def _check_stages(measurement: Measurement, context: Context) -> None:
    """Check that the bundle has the stages that a measurement needs."""
    if measurement.stages and context.cascade is None:
        raise ValueError("it measures a bundle: give model= instead of generated=")
    prior = stage_of_prior(context.settings.prior)
    needed = [prior if stage == "prior" else stage for stage in measurement.stages]
    require_stages(context.cascade, needed)


def mean_score(
    rows: Float[Tensor, " n"], *, seed: int, resamples: int = 1000, **about: Any
) -> Score:
    """Average a number that each image has, with its percentile bootstrap interval.

    Args:
        rows: the number of each image.
        seed: seed of the bootstrap.
        resamples: number of bootstrap resamples.
        about: other fields of the score.
    """
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
    """Return the 95% interval of a number with a normal error."""
    return value - Z95 * error, value + Z95 * error
