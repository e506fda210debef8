"""Plot a sweep: distance and agreement with the caption against guidance (figure 11)."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from unclip.evaluation.measurement import Table
from unclip.evaluation.tables import Section, write_csv
from unclip.files import atomic_write, read_json


class Point(NamedTuple):
    """One job of a sweep."""

    job: str
    key: str  # the name that comparable numbers share
    guidance: float | None  # guidance scale of the decoder; None if unknown
    settings: dict[str, Any]  # the other settings that the numbers depend on
    scores: dict[str, dict[str, Any]]

    def value(self, name: str, part: str = "value") -> float:
        """Return a part of a score; 0 if it is unknown."""
        return self.scores[name][part] or 0.0


def read_points(folder: Path) -> list[Point]:
    """Read the finished jobs of a sweep, in the order of their guidance."""
    points = []
    for path in folder.glob("*/results.json"):
        with suppress(OSError, ValueError, KeyError):  # not finished, or another program's file
            points.append(_point(path.parent.name, read_json(path)))
    points = [point for point in points if point.key is not None]  # None: no protocol's images
    return sorted(points, key=lambda point: (point.key, point.guidance or 0.0, point.job))


def _point(job: str, results: dict[str, Any]) -> Point:
    """Return a job with the settings in which two jobs can differ, named as on the command line."""
    made, sampling = results["made_with"], results["made_with"].get("sampling", {})
    decoder, prior = sampling.get("decoder", {}), sampling.get("prior", {})
    settings = {
        "model": results["model"],
        "prior": prior.get("sampler"),
        "prior_guidance": prior.get("guidance_scale"),
        **{f"steps.{stage}": how.get("steps") for stage, how in sampling.items()},
        "seed": made.get("seed"),
        **{f"networks.{name}": of_weights for name, of_weights in results["networks"].items()},
    }
    guidance = decoder.get("guidance_scale")
    return Point(job, results["key"], guidance, settings, results["scores"])


def write_curves(folder: Path) -> list[Section]:
    """Write curve-KEY.csv and curve-KEY.png for each key of a sweep; return a section for each.

    Only points of one key are comparable.
    """
    sections, every = [], read_points(folder)
    for key in sorted({point.key for point in every}):
        points = [point for point in every if point.key == key]
        section, path = Section(key, tables={"": table_of(points)}), folder / f"curve-{key}.png"
        write_csv(section.tables[""], path.with_suffix(".csv"))
        if (figure := plot(points)) is not None:
            section.images = {key: path}
            with atomic_write(path) as temporary:
                figure.savefig(temporary, format="png", dpi=110)
        sections.append(section)
    return sections


def differing(points: Sequence[Point]) -> list[str]:
    """Return the settings other than guidance in which points differ."""
    names = dict.fromkeys(name for point in points for name in point.settings)
    return [name for name in names if len({point.settings.get(name) for point in points}) > 1]


def table_of(points: Sequence[Point]) -> Table:
    """Return one row per point: guidance, differing settings, scores and errors."""
    columns = {"guidance": "guidance"}
    columns |= {f"settings/{name}": name for name in differing(points)}
    for name in dict.fromkeys(name for point in points for name in point.scores):
        columns |= {f"scores/{name}/value": name, f"scores/{name}/error": f"{name} ±"}
    return Table.of("job", {point.job: point._asdict() for point in points}, columns)


def lines_of(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Group the points that differ only in guidance, by their other settings."""
    names, lines = differing(points), {}
    for point in points:
        words = ", ".join(f"{name} {point.settings.get(name)}" for name in names)
        lines.setdefault(words, []).append(point)
    return lines


def axes(points: Sequence[Point]) -> list[str]:
    """Return the names of a distance (FID first) and an agreement that all points have."""
    shared = sorted(set.intersection(*(set(point.scores) for point in points)))
    distances = [name for name in shared if name.startswith(("fid", "fd_"))]
    agreements = [name for name in shared if name.startswith("clip_score")]
    return sorted(distances, key=lambda name: name != "fid")[:1] + agreements[:1]


def plot(points: Sequence[Point]) -> Any:
    """Plot scores over guidance and against each other; None if fewer than two points share one."""
    from matplotlib.figure import Figure

    points = [point for point in points if point.guidance is not None]
    names = axes(points) if len(points) > 1 else []
    if not names:
        return None
    figure = Figure(figsize=(4.6 * (2 * len(names) - 1), 3.6), layout="constrained")
    grid = figure.subplots(1, 2 * len(names) - 1, squeeze=False)[0]
    for axis, name in zip(grid, names, strict=False):
        _plot_over_guidance(axis, points, name)
    if len(names) == 2:
        distance, agreement = names
        grid[2].set(xlabel=agreement, ylabel=distance, title="trade-off")
        for line in lines_of(points).values():
            x, y = ([point.value(name) for point in line] for name in (agreement, distance))
            grid[2].plot(x, y, marker="o")
            for point, *place in zip(line, x, y, strict=True):
                words, offset = f"{point.guidance:g}", {"textcoords": "offset points"}
                grid[2].annotate(words, place, xytext=(5, 5), **offset)
    for axis in grid:
        axis.grid(alpha=0.3)
    figure.suptitle(f"{points[0].key}, n = {points[0].scores[names[0]]['n']:,}")
    return figure


def _plot_over_guidance(axis: Any, points: Sequence[Point], name: str) -> None:
    """Plot a score with its errors and that of real images; the title has the best one."""
    for words, line in lines_of(points).items():
        x, y = [point.guidance for point in line], [point.value(name) for point in line]
        errors = [point.value(name, "error") for point in line]
        axis.errorbar(x, y, yerr=errors, marker="o", capsize=3, label=words or None)
    first = points[0].scores[name]
    if first.get("real") is not None:
        axis.axhline(first["real"], linestyle=":", color="gray", label="real images")
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize="small")
    better = min if first["better"] == "lower" else max
    best = better(points, key=lambda point: point.value(name))
    title = f"best {best.value(name):.4g} at {best.guidance:g}"
    axis.set(xlabel="guidance scale of the decoder", ylabel=name, title=title)
