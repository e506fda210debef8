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
    guidance: float | None  # None is the stage's own
    prior_guidance: float | None
    scores: dict[str, dict[str, Any]]


def read_points(folder: Path) -> list[Point]:
    """The jobs of a sweep that have finished, in the order of their guidance."""
    points = []
    for path in folder.glob("*/results.json"):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            sampling = results["made_with"]
            points.append(
                Point(
                    path.parent.name,
                    results["key"],
                    sampling.get("guidance_scale"),
                    sampling.get("prior_guidance_scale"),
                    results["scores"],
                )
            )
        except (OSError, ValueError, KeyError):
            continue  # still being written, or another program's
    return sorted(points, key=lambda point: (point.key, point.guidance or 0.0, point.job))


def comparable(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points by key: no table and no curve holds points of two."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.key, []).append(point)
    return groups


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
        names = list(points[0].scores)
        head = ["job", "guidance", "prior_guidance"]
        lines = [[*head, *(f"{name}{part}" for name in names for part in ("", " ±"))]]
        for point in points:
            numbers = (
                point.scores.get(name, {}).get(part)
                for name in names
                for part in ("value", "error")
            )
            lines.append([point.job, point.guidance, point.prior_guidance, *numbers])
        table = folder / f"curve-{key}.csv"
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)
        written.append(table)
        if len(points) > 1 and (drawing := draw(points)) is not None:
            picture = folder / f"curve-{key}.png"
            write_beside(picture, drawing)
            written.append(picture)
    return written


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
    guidance = [point.guidance for point in points]
    for number, name in enumerate(names):
        axis = figure.add_subplot(1, panels, number + 1)
        values, errors = _column(points, name)
        axis.errorbar(guidance, values, yerr=errors, marker="o", capsize=3, color=f"C{number}")
        real = points[0].scores[name].get("real")
        if real is not None:
            axis.axhline(real, linestyle=":", color="grey", label="real pictures")
            axis.legend()
        axis.set(xlabel="guidance scale of the decoder", ylabel=name, title=_best(points, name))
        axis.grid(alpha=0.3)
    if len(names) == 2:
        axis = figure.add_subplot(1, panels, panels)
        across, up = _column(points, agreement)[0], _column(points, distance)[0]
        axis.plot(across, up, marker="o", color="C2")
        for point, x, y in zip(points, across, up, strict=True):
            axis.annotate(f"{point.guidance:g}", (x, y), textcoords="offset points", xytext=(5, 5))
        axis.set(xlabel=agreement, ylabel=distance, title="one against the other")
        axis.grid(alpha=0.3)
    figure.suptitle(f"{points[0].key}, n = {points[0].scores[names[0]]['n']:,}")
    png = BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _column(points: Sequence[Point], name: str) -> tuple[list[float], list[float]]:
    scores = [point.scores[name] for point in points]
    return [score["value"] for score in scores], [score["error"] or 0.0 for score in scores]


def _best(points: Sequence[Point], name: str) -> str:
    better = min if points[0].scores[name]["better"] == "lower" else max
    best = better(points, key=lambda point: point.scores[name]["value"])
    return f"best {best.scores[name]['value']:.4g} at {best.guidance:g}"
