"""The plot of quality over network evaluations: a panel a stage, a line a sampler."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes


def draw(
    points: Sequence[Any], studies: Mapping[str, Any], path: Path, *, tolerance: float
) -> Path:
    """Writes the plot; the grey line is the reference, the band what is within `tolerance`."""
    stages = list(dict.fromkeys(point.stage for point in points))
    figure, axes = pyplot.subplots(
        1, len(stages), figsize=(4.5 * len(stages), 4), layout="constrained", squeeze=False
    )
    for axis, stage in zip(axes[0], stages, strict=True):
        part = [point for point in points if point.stage == stage]
        _panel(axis, part, studies[stage].shown, tolerance)
        axis.set_title(stage)
    axes[0][0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _panel(axis: Axes, points: Sequence[Any], shown: str, tolerance: float) -> None:
    reference, rest = points[0], points[1:]
    level = reference.measured[shown]
    axis.axhspan(0, tolerance * level, color="0.92")
    axis.axhline(level, color="0.5", lw=1, label=f"DDPM, {reference.nfe} steps")
    for sampler in dict.fromkeys(point.sampler for point in rest):
        line = [point for point in rest if point.sampler == sampler]
        axis.plot(
            [point.nfe for point in line],
            [point.measured[shown] for point in line],
            marker="o",
            ms=4,
            label=sampler,
        )
    evaluations = sorted({point.nfe for point in rest})
    axis.set_xscale("log")
    axis.set_xticks(evaluations, [str(nfe) for nfe in evaluations])
    axis.minorticks_off()
    values = [point.measured[shown] for point in points]
    room = 0.1 * (max(values) - min(values)) or 0.1 * level
    axis.set_ylim(max(min(values) - room, 0), max(values) + room)
    axis.set_xlabel("network evaluations")
    axis.set_ylabel(shown.replace("_", " "))
