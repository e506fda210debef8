"""report.html: one page that needs no other file."""

import base64
import csv
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from unclip.evaluation.evaluation import Outcome
from unclip.evaluation.extremes import Chosen, extremes
from unclip.evaluation.probe_tables import probe_tables
from unclip.evaluation.report import (
    ENLARGEMENT_HEAD,
    GAP_HEAD,
    LIMIT_HEAD,
    SCORE_HEAD,
    by_reason,
    cell_text,
    enlargement_rows,
    gap_rows,
    headline,
    limit_rows,
    score_rows,
)

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #ddd}
table{border-collapse:collapse;margin:.6em 0;font-size:.92em}
th,td{padding:.25em .7em;border-bottom:1px solid #eee;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}
.tiles{display:flex;flex-wrap:wrap;gap:10px}.tiles figure{margin:0;width:132px}
.tiles img{width:132px;height:132px;image-rendering:auto}
figcaption{font-size:.75em;line-height:1.25}.wide{max-width:100%}
.key{font-family:monospace}.missing{color:#a33}
"""
_LARGEST = 1000  # pixels of an embedded sheet's side


def page(outcome: Outcome, *, curves: Sequence[Path] = ()) -> str:
    """The whole page.

    Args:
        outcome: of an evaluation.
        curves: pictures of a sweep's curves.
    """
    results = outcome.results
    title = f"Evaluation of {results['model'] or results['generated']}"
    parts = [f"<h1>{escape(title)}</h1>", _about(results), _scores(results)]
    if curves:
        parts += ["<h2>Guidance</h2>", *(_picture(path, path.stem) for path in curves)]
    if results.get("stages"):
        parts.append(_stages(results))
    if results.get("limits"):
        parts.append(_limits(results["limits"]))
    parts.append("<h2>Pictures</h2>")
    parts += [_tiles(name, chosen) for name, chosen in extremes(outcome).items()]
    parts += [_picture(Path(path), Path(path).stem) for path in _sheets(results)]
    parts += [_settings(results)]
    return document(title, parts)


def sweep_page(folder: Path, pictures: Sequence[Path], tables: Sequence[Path]) -> str:
    """A sweep's own page: a curve and a table for each key.

    Args:
        folder: of the sweep.
        pictures: the curves.
        tables: their numbers, as CSV.
    """
    parts = [f"<h1>Sweep of {escape(folder.name)}</h1>"]
    parts += [_picture(path, path.stem) for path in pictures]
    for path in tables:
        with path.open(newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
        parts += [f"<h2>{escape(path.stem)}</h2>", html_table(map(_numbers, rows), head)]
    return document(f"Sweep of {folder.name}", parts)


def _numbers(row: Sequence[str]) -> list[Any]:
    """A CSV's row with numbers as numbers."""
    values: list[Any] = []
    for text in row:
        try:
            values.append(float(text))
        except ValueError:
            values.append(text)
    return values


def document(title: str, parts: Sequence[str]) -> str:
    """A page of some parts."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def html_table(rows: Iterable[Sequence[Any]], head: Sequence[str]) -> str:
    """A table, numbers to the right."""
    lines = ["".join(f"<th>{escape(word)}</th>" for word in head)]
    for row in rows:
        cells = (
            f"<td{'' if isinstance(value, str) else ' class=n'}>{escape(cell_text(value))}</td>"
            for value in row
        )
        lines.append("".join(cells))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _about(results: dict[str, Any]) -> str:
    protocol = results["protocol"]
    return (
        f"<p>Protocol <b>{escape(protocol['name'])}</b>: {results['n']:,} pictures of "
        f"{protocol['resolution']} px, captions of {escape(protocol['split'])} "
        f"({protocol['captions'].replace('_', ' ')}), against {results['n_reference']:,} pictures "
        f"of {escape(protocol['reference'])}. Numbers compare only under one key: "
        f'<span class="key">{escape(results["key"])}</span></p>'
    )


def _scores(results: dict[str, Any]) -> str:
    parts = ["<h2>Scores</h2>"]
    if rows := score_rows(results):
        parts.append(html_table(rows, SCORE_HEAD))
        parts.append(
            "<p>“real” is the same number of real pictures in the generated ones' place: of a "
            "distance the floor at that count, of a score of agreement what real pictures reach. "
            "A Fréchet distance is biased upwards by small counts.</p>"
        )
    for why, names in by_reason(results["not_available"]).items():
        parts.append(f'<p class="missing">not available: <b>{escape(names)}</b>: {escape(why)}</p>')
    return "\n".join(parts)


def _stages(results: dict[str, Any]) -> str:
    rows = [
        [name, stage["parameters"] / 1e6, stage["steps"], stage["seconds"], headline(name, results)]
        for name, stage in results["stages"].items()
    ]
    head = ["stage", "M parameters", "steps", "seconds trained", "result"]
    parts = ["<h2>Stage by stage</h2>", html_table(rows, head)]
    if gap := results.get("decoder", {}).get("prior_gap"):
        parts += ["<h2>What the prior costs</h2>", html_table(gap_rows(gap), GAP_HEAD)]
    if prior := results.get("prior"):
        names = list(next(iter(prior.values())))
        rows = [[split, *(numbers[name] for name in names)] for split, numbers in prior.items()]
        parts += ["<h2>The prior's embeddings</h2>", html_table(rows, ["captions of", *names])]
    if enlarged := enlargement_rows(results):
        parts += ["<h2>The upsamplers</h2>", html_table(enlarged, ENLARGEMENT_HEAD)]
    for probed in probe_tables(results):
        parts += [f"<h2>{escape(probed.title)}</h2>", html_table(probed.rows, probed.head)]
    for name, why in results.get("left_out", {}).items():
        parts.append(f'<p class="missing">left out: <b>{escape(name)}</b>: {escape(why)}</p>')
    return "\n".join(parts)


def _limits(limits: dict[str, Any]) -> str:
    parts = ["<h2>The limits that the paper admits</h2>"]
    if rows := limit_rows(limits):
        parts.append(html_table(rows, LIMIT_HEAD))
        parts.append(
            "<p>“real” is the same of real pictures: of spelling it is how far the "
            "reader itself can be trusted, of detail one half of them beside "
            "the other. Detail is in decibels over the real pictures' power, 0 being as much.</p>"
        )
    for name, measured in limits.items():
        if why := measured.get("not_available"):
            words = f"not available: <b>{escape(name)}</b>: {escape(why)}"
            parts.append(f'<p class="missing">{words}</p>')
        if words := measured["about"].get("summary"):
            parts.append(f"<p>{escape(words)}</p>")
        parts += [_picture(Path(path), Path(path).stem) for path in measured["paths"]]
    return "\n".join(parts)


def _tiles(title: str, chosen: Chosen) -> str:
    figures = []
    for picture, number in chosen:
        words = picture.prompt or picture.id
        words = words if number is None else f"{number:.1f}: {words}"
        figures.append(
            f'<figure><img src="{_embedded(picture.path)}" alt="{escape(words, quote=True)}">'
            f"<figcaption>{escape(words)}</figcaption></figure>"
        )
    return f'<h3>{escape(title)}</h3><div class="tiles">{"".join(figures)}</div>'


def _sheets(results: dict[str, Any]) -> list[str]:
    """The benchmark's sheets; its full-size pictures lie beside the page."""
    return [path for path in results.get("paths", []) if Path(path).parent.name == "pictures"]


def _picture(path: Path, title: str) -> str:
    title = escape(title, quote=True)
    return f'<h3>{title}</h3><img class="wide" src="{_embedded(path)}" alt="{title}">'


def _embedded(path: Path) -> str:
    """A picture as a data URL, no larger than the page can show."""
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
        picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
        content = BytesIO()
        picture.save(content, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _settings(results: dict[str, Any]) -> str:
    made = results["made_with"]
    rows = [
        [name, str(value)] for name, value in made.items() if name not in ("protocol", "sampling")
    ]
    for stage, sampling in made.get("sampling", {}).items():
        words = ", ".join(f"{name} {value}" for name, value in sampling.items())
        rows.append([f"{stage} sampled with", words])
    rows += [[f"protocol.{name}", str(value)] for name, value in results["protocol"].items()]
    rows += [[name, value] for name, value in results["versions"].items()]
    rows += [["device", results["device"]], ["seconds", str(results["seconds"])]]
    return "<h2>Settings</h2>" + html_table(rows, ["setting", "value"])
