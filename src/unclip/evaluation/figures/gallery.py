"""A folder of figures: each a JSON beside its pictures, and a page of them all."""

import json
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from unclip.evaluation.figures.base import Drawn, Figure
from unclip.evaluation.page import document, html_table
from unclip.images import save_png

PAGE = "index.html"


def write_figure(
    out: Path,
    name: str,
    figure: Figure,
    drawn: Drawn,
    *,
    command: str,
    made_with: Mapping[str, Any],
) -> list[Path]:
    """Writes a figure's pictures and its JSON, and the page anew; returns what was written.

    Args:
        out: the folder.
        name: of the figure.
        figure: what was drawn.
        drawn: what came of it.
        command: the command that draws it.
        made_with: the bundle's fingerprints, seed and the like.
    """
    pictures = [save_png(sheet, out / f"{stem}.png") for stem, sheet in drawn.sheets.items()]
    told = {
        "title": figure.title,
        "about": figure.about,
        "remark": drawn.remark,
        "command": command,
        "pictures": [path.name for path in pictures],
        "tables": {title: table._asdict() for title, table in drawn.tables.items()},
        "made_with": dict(made_with),
    }
    file = out / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [*pictures, file, write_page(out)]


def write_page(out: Path) -> Path:
    """The page of all figures in a folder; its pictures lie beside it."""
    parts = ["<h1>Figures and tables</h1>"]
    for file in sorted(out.glob("*.json")):
        parts.append(_section(json.loads(file.read_text(encoding="utf-8"))))
    page = out / PAGE
    page.write_text(document("Figures and tables", parts), encoding="utf-8")
    return page


def command_of(figure: str, overrides: list[str]) -> str:
    """The command line that draws a figure."""
    return shlex.join(["python", "src/reproduce.py", f"figure={figure}", *overrides])


def _section(told: Mapping[str, Any]) -> str:
    parts = [f"<h2>{escape(told['title'])}</h2>", f"<p>{escape(told['about'])}</p>"]
    for name in told["pictures"]:
        address = escape(name, quote=True)
        parts.append(f'<a href="{address}"><img class="wide" src="{address}" alt="{address}"></a>')
    for title, table in told["tables"].items():
        parts += [f"<h3>{escape(title)}</h3>", html_table(table["rows"], table["head"])]
    if told["remark"]:
        parts.append(f"<p>{escape(told['remark'])}</p>")
    return "\n".join([*parts, f'<p class="key">{escape(told["command"])}</p>'])
