"""report.html: one page that needs no other file."""

import base64
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from unclip.evaluation.measurement import Table
from unclip.evaluation.report.results import Report
from unclip.evaluation.report.tables import by_reason, format_cell, score_table

_LARGEST = 1000  # pixels of an embedded image's longer side
_BASELINE = (
    "“real” has as many real images in place of the generated ones: for a distance it is the floor "
    "at that count, for an agreement the ceiling. A Fréchet distance is biased upwards for few "
    "images."
)


@dataclass
class Section:
    """A part of the page.

    Attributes:
        title: heading; empty for none.
        notes: paragraphs.
        missing: names by the reason why they are not available.
        tables: tables by heading.
        images: paths of wide images.
        tiles: small images with their captions by heading.
    """

    title: str = ""
    notes: Sequence[str] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    images: Sequence[Path] = ()
    tiles: Mapping[str, Sequence[tuple[str, Path]]] = field(default_factory=dict)


def render(title: str, sections: Sequence[Section]) -> str:
    """Render a page of sections; all text is escaped."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("unclip.evaluation.report", "")
    environment = Environment(loader=loader, autoescape=True, keep_trailing_newline=True)
    environment.filters |= {"cell": format_cell, "embedded": _embed}
    page = environment.get_template("report.html.j2")
    return page.render(title=title, sections=[one for one in sections if _has_content(one)])


def render_report(report: Report, *, curves: Sequence[Path] = ()) -> str:
    """Render an evaluation's page.

    Args:
        report: the evaluation.
        curves: images of a sweep's curves.
    """
    results, missing = report.results, by_reason(report.results["not_available"])
    scores = {"": score_table(results["scores"])} if results["scores"] else {}
    notes = [_BASELINE] if scores else []
    sections = [
        Section(notes=_about(results)),
        Section("Scores", notes, missing, scores),
        Section("Guidance", images=curves),
    ]
    for name, result in report.found.results.items():
        shown = [path for path in report.images.get(name, ()) if path.parent.name == "images"]
        notes = [result.note] if result.note else []
        sections.append(
            Section(report.titles[name], notes, tables=result.tables, images=shown)
            if result.tables or shown
            else Section(notes=notes)
        )
    tiles = {
        title: [(_caption(row, number), row.path) for row, number in chosen]
        for title, chosen in report.best_and_worst().items()
    }
    sections += [Section("Images", tiles=tiles), _settings(results)]
    return render(f"Evaluation of {results['model'] or results['generated']}", sections)


def render_sweep(folder: Path, images: Sequence[Path], tables: Sequence[Path]) -> str:
    """Render a sweep's page: a curve and a table for each key.

    Args:
        folder: folder of the sweep.
        images: the curves.
        tables: their numbers, as CSV files.
    """
    sections = [Section(images=images)]
    for path in tables:
        with path.open(newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
        table = Table(head, [[_parse(text) for text in row] for row in rows])
        sections.append(Section(path.stem, tables={"": table}))
    return render(f"Sweep of {folder.name}", sections)


def _has_content(section: Section) -> bool:
    parts = (section.notes, section.missing, section.tables, section.images, section.tiles)
    return any(parts)


def _about(results: Mapping[str, Any]) -> list[str]:
    """Describe the protocol."""
    if results["key"] is None:
        return []
    protocol = results["protocol"]
    return [
        f"Protocol {protocol['name']}: {results['n']:,} images of {protocol['resolution']} px, "
        f"captions of {protocol['split']} ({protocol['captions'].replace('_', ' ')}), compared "
        f"with {results['n_reference']:,} images of {protocol['reference']}. Only numbers with "
        f"the same key are comparable: {results['key']}"
    ]


def _caption(row: Any, number: float | None) -> str:
    words = row.prompt or row.id
    return words if number is None else f"{number:.1f}: {words}"


def _settings(results: Mapping[str, Any]) -> Section:
    made = results["made_with"]
    rows = [[k, str(value)] for k, value in made.items() if k not in ("protocol", "sampling")]
    for stage, sampling in made.get("sampling", {}).items():
        words = ", ".join(f"{name} {value}" for name, value in sampling.items())
        rows.append([f"{stage} sampled with", words])
    rows += [[f"protocol.{name}", str(value)] for name, value in results["protocol"].items()]
    rows += [[name, value] for name, value in results["versions"].items()]
    rows += [["device", results["device"]], ["seconds", str(results["seconds"])]]
    return Section("Settings", tables={"": Table(["setting", "value"], rows)})


def _parse(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _embed(path: Path) -> str:
    """Encode an image as a data URL, no larger than the page can show."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
        content = BytesIO()
        image.save(content, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
