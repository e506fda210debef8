"""Plot a sweep: distance and agreement with the caption against guidance (figure 11)."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unclip.files import atomic_write


class Point(NamedTuple):
    """One job of a sweep."""

    job: str
    key: str  # of comparable numbers
    guidance: float | None  # of the decoder; None if unknown
    settings: dict[str, Any]  # the other settings that the numbers depend on
    scores: dict[str, dict[str, Any]]


def read_points(folder: Path) -> list[Point]:
    """Read the finished jobs of a sweep, in the order of their guidance."""
    points = []
    for path in folder.glob("*/results.json"):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            settings = _settings(results)
            guidance, key = settings.pop("guidance"), results["key"]
            points.append(Point(path.parent.name, key, guidance, settings, results["scores"]))
        except (OSError, ValueError, KeyError):
            continue  # not finished, or another program's file
    points = [point for point in points if point.key is not None]  # None: no protocol's images
    return sorted(points, key=lambda point: (point.key, point.guidance or 0.0, point.job))


def _settings(results: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in which two jobs can differ, named as on the command line."""
    made = results["made_with"]
    sampling: dict[str, dict[str, Any]] = made.get("sampling", {})
    return {
        "model": results["model"],
        "guidance": sampling.get("decoder", {}).get("guidance_scale"),
        "prior": sampling.get("prior", {}).get("sampler"),
        "prior_guidance": sampling.get("prior", {}).get("guidance_scale"),
        **{f"steps.{stage}": how.get("steps") for stage, how in sampling.items()},
        "seed": made.get("seed"),
        **{f"networks.{name}": of_weights for name, of_weights in results["networks"].items()},
    }


def comparable(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Group points by key; only points of one key are comparable."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.key, []).append(point)
    return groups


def differing(points: Sequence[Point]) -> list[str]:
    """Return the settings other than guidance in which points differ."""
    names = dict.fromkeys(name for point in points for name in point.settings)
    return [name for name in names if len({point.settings.get(name) for point in points}) > 1]


def lines_of(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Group the points that differ only in guidance, by their other settings."""
    names = differing(points)
    lines: dict[str, list[Point]] = {}
    for point in points:
        words = ", ".join(f"{name} {point.settings.get(name)}" for name in names)
        lines.setdefault(words, []).append(point)
    return lines


def axes(points: Sequence[Point]) -> tuple[str | None, str | None]:
    """Return the names of a distance (FID first) and an agreement that all points have."""
    shared = set.intersection(*(set(point.scores) for point in points))
    distances = sorted(
        (name for name in shared if name == "fid" or name.startswith("fd_")),
        key=lambda name: (name != "fid", name),
    )
    agreements = sorted(name for name in shared if name.startswith("clip_score"))
    return (distances or [None])[0], (agreements or [None])[0]


def write_curves(folder: Path) -> list[Path]:
    """Write curve-KEY.csv and curve-KEY.png for each key in a sweep's results."""
    written = []
    for key, points in comparable(read_points(folder)).items():
        table = folder / f"curve-{key}.csv"
        with (
            atomic_write(table) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file).writerows(rows_of(points))
        written.append(table)
        if (figure := plot(points)) is not None:
            written.append(folder / f"curve-{key}.png")
            with atomic_write(written[-1]) as temporary:
                figure.savefig(temporary, format="png", dpi=110)
    return written


def rows_of(points: Sequence[Point]) -> list[list[Any]]:
    """Return a head and one row per point: guidance, differing settings, scores and errors."""
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


def plot(points: Sequence[Point]) -> Any:
    """Plot scores over guidance and against each other; None if fewer than two points share one."""
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
    for number, name in enumerate(names):
        _plot_over_guidance(figure.add_subplot(1, panels, number + 1), points, name)
    if len(names) == 2:
        _plot_against_each_other(figure.add_subplot(1, panels, panels), points, agreement, distance)
    figure.suptitle(f"{points[0].key}, n = {points[0].scores[names[0]]['n']:,}")
    return figure


def _plot_over_guidance(axis: Any, points: Sequence[Point], name: str) -> None:
    """Plot a score over guidance, one line for each choice of the other settings."""
    for words, line in lines_of(points).items():
        guidance = [point.guidance for point in line]
        values, errors = _column(line, name)
        axis.errorbar(guidance, values, yerr=errors, marker="o", capsize=3, label=words or None)
    real = points[0].scores[name].get("real")
    if real is not None:
        axis.axhline(real, linestyle=":", color="gray", label="real images")
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize="small")
    axis.set(xlabel="guidance scale of the decoder", ylabel=name, title=_best(points, name))
    axis.grid(alpha=0.3)


def _plot_against_each_other(axis: Any, points: Sequence[Point], across: str, up: str) -> None:
    """Plot a score over another, with the guidance next to each point."""
    for line in lines_of(points).values():
        x, y = _column(line, across)[0], _column(line, up)[0]
        axis.plot(x, y, marker="o")
        for point, *place in zip(line, x, y, strict=True):
            axis.annotate(f"{point.guidance:g}", place, textcoords="offset points", xytext=(5, 5))
    axis.set(xlabel=across, ylabel=up, title="trade-off")
    axis.grid(alpha=0.3)


def _column(points: Sequence[Point], name: str) -> tuple[list[float], list[float]]:
    scores = [point.scores[name] for point in points]
    return [score["value"] for score in scores], [score["error"] or 0.0 for score in scores]


def _best(points: Sequence[Point], name: str) -> str:
    better = min if points[0].scores[name]["better"] == "lower" else max
    best = better(points, key=lambda point: point.scores[name]["value"])
    return f"best {best.scores[name]['value']:.4g} at {best.guidance:g}"
