"""report.html: one page that needs no other file."""

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from unclip.evaluation.measurement import Table
from unclip.evaluation.report.results import Report
from unclip.evaluation.report.tables import Section, format_cell

_LARGEST = 1000  # pixels of an embedded image's longer side


def render(title: str, sections: Sequence[Section]) -> str:
    """Render a page of sections; all text is escaped."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("unclip.evaluation.report", "")
    environment = Environment(loader=loader, autoescape=True, keep_trailing_newline=True)
    environment.filters |= {"cell": format_cell, "embedded": _embed}
    shown = [one for one in sections if one.notes or one.tables or one.images]
    return environment.get_template("report.html.j2").render(title=title, sections=shown)


def render_report(report: Report, *, curves: Mapping[str, Image.Image | Path]) -> str:
    """Render an evaluation's page, with the curves of its sweep by title."""
    scores, *others = report.sections
    sections = [
        Section(notes=_about(report.results)),
        scores,
        Section("Guidance", images=curves),
        *others,
        Section("Settings", tables={"": _settings(report.results)}),
    ]
    return render(
        f"Evaluation of {report.results['model'] or report.results['generated']}", sections
    )


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


def _settings(results: Mapping[str, Any]) -> Table:
    """Return what the numbers depend on."""
    made = {**results["made_with"]}
    made.pop("protocol", None)
    for stage, sampling in made.pop("sampling", {}).items():
        words = ", ".join(f"{name} {value}" for name, value in sampling.items())
        made[f"{stage} sampled with"] = words
    made |= {f"protocol.{name}": value for name, value in results["protocol"].items()}
    made |= {**results["versions"], "device": results["device"], "seconds": results["seconds"]}
    return Table(["setting", "value"], [[name, str(value)] for name, value in made.items()])


def _embed(image: Path | Image.Image) -> str:
    """Encode an image as a data URL, no larger than the page can show."""
    opened = (Image.open(image) if isinstance(image, Path) else image).convert("RGB")
    opened.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    content = BytesIO()
    opened.save(content, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
