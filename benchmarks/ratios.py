"""How many times faster ours is than each peer, beside what is to be reached."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from interleaved import Timing

# To be reached on two CPU cores: (stage, measure) → peer → how many times as fast
TARGETS = {
    ("decoder", "train"): {"diffusers": 1.05, "GLIDE": 1.10, "DALLE2-pytorch": 1.5},
    ("decoder", "step"): {"diffusers, channels_last": 1.05, "DALLE2-pytorch": 2.0},
    ("prior", "train"): {"diffusers": 3.5},
    ("prior", "step"): {"diffusers": 8.0},
}
UNITS = {
    ("decoder", "train"): "images/s",
    ("decoder", "step"): "images/s",
    ("decoder", "sample"): "samples/s",
    ("prior", "train"): "noise samples/s",
    ("prior", "step"): "embeddings/s",
    ("prior", "sample"): "samples/s",
}


@dataclass(frozen=True)
class Row:
    """One contender in one measure; `ratio` is how many times as fast ours is."""

    stage: str
    measure: str
    contender: str
    parameters: int
    milliseconds: float  # median
    milliseconds_low: float  # the quartiles
    milliseconds_high: float
    rounds: int
    rate: float
    unit: str
    peak_mib: float | None
    ratio: float  # median over rounds
    ratio_low: float  # the quartiles
    ratio_high: float
    target: float | None
    reached: bool | None


def rows(
    stage: str,
    measure: str,
    timings: list[Timing],
    about: dict[str, dict[str, Any]],
    *,
    items: int,
    judged: bool,
) -> list[Row]:
    """A row a contender; the first one is ours.

    A ratio is the median of the ratios round by round: what slows a machine down for longer than
    a round slows both.

    Args:
        stage: "decoder" or "prior".
        measure: "train", "step" or "sample".
        timings: ours first.
        about: what each contender said of itself.
        items: pictures or captions of one call.
        judged: whether the targets are for this machine.
    """
    ours = timings[0]
    result = []
    for timing in timings:
        noises = {
            t.contender: about[t.contender]["noises"] if measure == "train" else 1
            for t in (ours, timing)
        }
        gain = noises[ours.contender] / noises[timing.contender]
        ratios = [
            gain * theirs / own for theirs, own in zip(timing.seconds, ours.seconds, strict=True)
        ]
        low, ratio, high = _quartiles(ratios)
        fast, median, slow = _quartiles([1000 * seconds for seconds in timing.seconds])
        target = TARGETS.get((stage, measure), {}).get(timing.contender) if judged else None
        result.append(
            Row(
                stage=stage,
                measure=measure,
                contender=timing.contender,
                parameters=about[timing.contender]["parameters"],
                milliseconds=median,
                milliseconds_low=fast,
                milliseconds_high=slow,
                rounds=len(timing.seconds),
                rate=1000 * items * noises[timing.contender] / median,
                unit=UNITS[stage, measure],
                peak_mib=None if timing.peak_bytes is None else timing.peak_bytes / 2**20,
                ratio=ratio,
                ratio_low=low,
                ratio_high=high,
                target=target,
                reached=None if target is None else ratio >= target,
            )
        )
    return result


HEAD = ["contender", "M params", "ms", "±", "rate", "MiB", "ratio", "from", "to", "target", ""]


def cells(row: Row) -> list[Any]:
    """A row as it is printed under `HEAD`."""
    verdict = {None: "", True: "pass", False: "FAIL"}[row.reached]
    return [
        row.contender,
        row.parameters / 1e6,
        row.milliseconds,
        (row.milliseconds_high - row.milliseconds_low) / 2,
        row.rate,
        None if row.peak_mib is None else round(row.peak_mib),
        row.ratio,
        row.ratio_low,
        row.ratio_high,
        row.target,
        verdict,
    ]


def plain(row: Row) -> dict[str, Any]:
    """A row as JSON has it."""
    return asdict(row)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high
