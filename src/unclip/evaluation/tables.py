"""Sections of a report, and their tables as text, CSV and HTML."""

import base64
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from unclip.evaluation.measurement import Numbers, Table
from unclip.files import atomic_write

_LARGEST = 1000  # pixels of an embedded image's longer side
_SCORE_COLUMNS = {
    "value": "value",
    "error": "±",
    "low": "95% from",
    "high": "to",
    "real": "real",
    "better": "better",
    "n": "n",
    "n_reference": "against",
    "n_real": "n real",
}


@dataclass
class Section:
    """A part of a report."""

    title: str = ""  # heading; empty for none
    notes: Sequence[str] = ()  # paragraphs
    tables: Mapping[str, Table] = field(default_factory=dict)  # tables by heading
    # images, or the files they are in, by heading
    images: Mapping[str, Image.Image | Path] = field(default_factory=dict)


def format_table(table: Table) -> str:
    """Pad columns to a common width; words are left-aligned, numbers right-aligned."""
    cells = [[format_cell(value) for value in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(table.head, *cells, strict=True)]
    words = [any(isinstance(row[k], str) for row in table.rows) for k in range(len(table.head))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, words, strict=True)
        ]
        return "  ".join(padded).rstrip()

    rule = ["─" * width for width in widths]
    return "\n".join([line(table.head), line(rule), *(line(row) for row in cells)])


def write_csv(table: Table, path: Path) -> None:
    """Write a table atomically as CSV."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([table.head, *table.rows])


def format_cell(value: Any) -> str:
    """Format a value for a table."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def score_table(scores: Mapping[str, Numbers]) -> Table:
    """Return one row per score, as results.json has them."""
    found = {}
    for name, score in scores.items():
        low, high = score["interval"] or (None, None)
        found[name] = {**score, "low": low, "high": high}
    return Table.of("score", found, _SCORE_COLUMNS)


def not_available(reasons: Mapping[str, str]) -> list[str]:
    """Return a line for each reason why measurements are missing, with all of their names."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [f"not available: {', '.join(shared)}: {reason}" for reason, shared in names.items()]


def render(title: str, sections: Sequence[Section]) -> str:
    """Render a page of sections; all text is escaped."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("unclip.evaluation", "")
    environment = Environment(loader=loader, autoescape=True, keep_trailing_newline=True)
    environment.filters |= {"cell": format_cell, "embedded": _embed}
    shown = [one for one in sections if one.notes or one.tables or one.images]
    return environment.get_template("report.html.j2").render(title=title, sections=shown)


def _embed(image: Path | Image.Image) -> str:
    """Encode an image as a data URL, no larger than the page can show."""
    opened = (Image.open(image) if isinstance(image, Path) else image).convert("RGB")
    opened.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    content = BytesIO()
    opened.save(content, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
