"""Tables as text, and the table of scores."""

from collections.abc import Mapping, Sequence
from typing import Any

from unclip.evaluation.measurement import Table

_SCORE_HEAD = ["score", "value", "±", "95% from", "to", "real", "better", "n", "against", "n real"]


def format_table(table: Table) -> str:
    """Pad columns to a common width; words are left-aligned, numbers right-aligned."""
    cells = [[format_cell(value) for value in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(table.head, *cells, strict=True)]
    numeric = [all(_is_number(row[k]) for row in table.rows) for k in range(len(table.head))]

    def line(words: Sequence[str]) -> str:
        padded = [
            word.rjust(width) if right else word.ljust(width)
            for word, width, right in zip(words, widths, numeric, strict=True)
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


def format_duration(seconds: float) -> str:
    """Format a duration in minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return one row per score, as results.json has them."""
    rows = []
    for name, score in scores.items():
        low, high = score["interval"] or (None, None)
        numbers = [score["value"], score["error"], low, high, score["real"]]
        rows.append([name, *numbers, score["better"], score["n"], score["n_reference"]])
        rows[-1].append(score["n_real"])
    return Table(_SCORE_HEAD, rows)


def by_reason(not_available: Mapping[str, str]) -> dict[str, str]:
    """Join the names that share a reason: {reason: "name, name"}."""
    names: dict[str, list[str]] = {}
    for name, reason in not_available.items():
        names.setdefault(reason, []).append(name)
    return {reason: ", ".join(shared) for reason, shared in names.items()}


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
