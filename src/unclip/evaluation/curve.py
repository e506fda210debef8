"""A sweep's summary: distance and agreement with the caption against guidance (figure 11)."""

import csv
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from unclip.evaluation.folder import write_beside


class Point(NamedTuple):
    """One job of a sweep."""

    job: str
    key: str  # of numbers that compare
    guidance: float | None  # the decoder's; None where nobody says it
    settings: dict[str, Any]  # what else the numbers depend on
    scores: dict[str, dict[str, Any]]


def read_points(folder: Path) -> list[Point]:
    """The jobs of a sweep that have finished, in the order of their guidance."""
    points = []
    for path in folder.glob("*/results.json"):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            settings = _settings(results)
            guidance = settings.pop("guidance")
            points.append(
                Point(path.parent.name, results["key"], guidance, settings, results["scores"])
            )
        except (OSError, ValueError, KeyError):
            continue  # still being written, or another program's
    return sorted(points, key=lambda point: (point.key, point.guidance or 0.0, point.job))


def _settings(results: dict[str, Any]) -> dict[str, Any]:
    """What two jobs of a sweep may differ in, by the names of the command line."""
    made = results["made_with"]
    sampling: dict[str, dict[str, Any]] = made.get("sampling", {})
    return {
        "model": results["model"],
        "guidance": sampling.get("decoder", {}).get("guidance_scale"),
        "prior_guidance": sampling.get("prior", {}).get("guidance_scale"),
        **{f"steps.{stage}": how.get("steps") for stage, how in sampling.items()},
        "seed": made.get("seed"),
        **{f"networks.{name}": of_weights for name, of_weights in results["networks"].items()},
    }


def comparable(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points by key: no table and no curve holds points of two."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.key, []).append(point)
    return groups


def differing(points: Sequence[Point]) -> list[str]:
    """The settings beside guidance in which some points differ."""
    names = dict.fromkeys(name for point in points for name in point.settings)
    return [name for name in names if len({point.settings.get(name) for point in points}) > 1]


def lines_of(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points that differ in guidance alone, by what tells them from the others."""
    names = differing(points)
    lines: dict[str, list[Point]] = {}
    for point in points:
        words = ", ".join(f"{name} {point.settings.get(name)}" for name in names)
        lines.setdefault(words, []).append(point)
    return lines


def axes(points: Sequence[Point]) -> tuple[str | None, str | None]:
    """The names of the distance and of the agreement that all points have: FID before others."""
    shared = set.intersection(*(set(point.scores) for point in points))
    distances = sorted(
        (name for name in shared if name == "fid" or name.startswith("fd_")),
        key=lambda name: (name != "fid", name),
    )
    agreements = sorted(name for name in shared if name.startswith("clip_score"))
    return (distances or [None])[0], (agreements or [None])[0]


def write_curve(folder: Path) -> list[Path]:
    """Writes curve-KEY.png and curve-KEY.csv for each key among a sweep's results."""
    written = []
    for key, points in comparable(read_points(folder)).items():
        table = folder / f"curve-{key}.csv"
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows_of(points))
        written.append(table)
        if len(points) > 1 and (drawing := draw(points)) is not None:
            picture = folder / f"curve-{key}.png"
            write_beside(picture, drawing)
            written.append(picture)
    return written


def rows_of(points: Sequence[Point]) -> list[list[Any]]:
    """A head and a row a point: its guidance, the settings that differ, its scores and errors."""
    settings = differing(points)
    scores = list(dict.fromkeys(name for point in points for name in point.scores))
    columns = [f"{name}{part}" for name in scores for part in ("", " ±")]
    rows: list[list[Any]] = [["job", "guidance", *settings, *columns]]
    for point in points:
        numbers = (
            point.scores.get(name, {}).get(part) for name in scores for part in ("value", "error")
        )
        chosen = (point.settings.get(name) for name in settings)
        rows.append([point.job, point.guidance, *chosen, *numbers])
    return rows


def draw(points: Sequence[Point]) -> bytes | None:
    """The curve as a PNG: over guidance, and against each other; None where no name is shared."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [point for point in points if point.guidance is not None]
    if len(points) < 2:
        return None
    distance, agreement = axes(points)
    names = [name for name in (distance, agreement) if name is not None]
    if not names:
        return None
    panels = len(names) + (len(names) == 2)
    figure = Figure(figsize=(4.6 * panels, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        _over_guidance(figure.add_subplot(1, panels, number + 1), points, name)
    if len(names) == 2:
        _against_each_other(figure.add_subplot(1, panels, panels), points, agreement, distance)
    figure.suptitle(f"{points[0].key}, n = {points[0].scores[names[0]]['n']:,}")
    png = BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _over_guidance(axis: Any, points: Sequence[Point], name: str) -> None:
    """A score over guidance, one line for each choice of the other settings."""
    for words, line in lines_of(points).items():
        guidance = [point.guidance for point in line]
        values, errors = _column(line, name)
        axis.errorbar(guidance, values, yerr=errors, marker="o", capsize=3, label=words or None)
    real = points[0].scores[name].get("real")
    if real is not None:
        axis.axhline(real, linestyle=":", color="grey", label="real pictures")
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize="small")
    axis.set(xlabel="guidance scale of the decoder", ylabel=name, title=_best(points, name))
    axis.grid(alpha=0.3)


def _against_each_other(axis: Any, points: Sequence[Point], across: str, up: str) -> None:
    """A score over another, each point with its guidance."""
    for line in lines_of(points).values():
        x, y = _column(line, across)[0], _column(line, up)[0]
        axis.plot(x, y, marker="o")
        for point, *place in zip(line, x, y, strict=True):
            axis.annotate(f"{point.guidance:g}", place, textcoords="offset points", xytext=(5, 5))
    axis.set(xlabel=across, ylabel=up, title="one against the other")
    axis.grid(alpha=0.3)


def _column(points: Sequence[Point], name: str) -> tuple[list[float], list[float]]:
    scores = [point.scores[name] for point in points]
    return [score["value"] for score in scores], [score["error"] or 0.0 for score in scores]


def _best(points: Sequence[Point], name: str) -> str:
    better = min if points[0].scores[name]["better"] == "lower" else max
    best = better(points, key=lambda point: point.scores[name]["value"])
    return f"best {best.scores[name]['value']:.4g} at {best.guidance:g}"
