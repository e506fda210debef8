"""Sections of a report, tables as text, and the table of scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from unclip.evaluation.measurement import Numbers, Table

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
    """A part of a report.

    Attributes:
        title: heading; empty for none.
        notes: paragraphs.
        tables: tables by heading.
        images: images, or the files they are in, by heading.
    """

    title: str = ""
    notes: Sequence[str] = ()
    tables: Mapping[str, Table] = field(default_factory=dict)
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
