"""Write everything that an evaluation leaves: files, a page, printed tables, logger entries.

results.json has every number with what it depends on.
"""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from unclip.contact_sheet import Tile, contact_sheet
from unclip.evaluation.context import Context
from unclip.evaluation.generation import GeneratedImage, ImageFolder
from unclip.evaluation.measurement import Measurement, Results, Table
from unclip.evaluation.sweep_plot import write_curves
from unclip.evaluation.tables import (
    Section,
    format_table,
    not_available,
    render,
    score_table,
    write_csv,
)
from unclip.files import write_text
from unclip.images import open_image, save_png, to_tensor
from unclip.provenance import package_versions

FORMAT = 2

_BASELINE = (
    "“real” has as many real images in place of the generated ones: for a distance it is the floor "
    "at that count, for an agreement the ceiling. A Fréchet distance is biased upwards for few "
    "images."
)

Chosen = list[tuple[GeneratedImage, float | None]]


@dataclass
class Report:
    """An evaluation's outcome, ready to be written."""

    results: dict[str, Any]  # the content of results.json
    found: Results  # the results of all measurements
    folder: ImageFolder | None = None  # the protocol's images; None if no measurement needed them

    @property
    def key(self) -> str:
        """The name that comparable numbers share."""
        return self.results["key"] or self.results["protocol"]["name"]

    @property
    def rows(self) -> dict[str, torch.Tensor]:
        """The scores that are means over the protocol's images, image by image."""
        count = 0 if self.folder is None else len(self.folder.rows)
        rows = {name: score.rows for name, score in self.found.scores.items()}
        return {name: one for name, one in rows.items() if one is not None and len(one) == count}

    @cached_property
    def sections(self) -> list[Section]:
        """The scores, each measurement, and the best and worst images."""
        scores, missing = self.results["scores"], not_available(self.results["not_available"])
        tables = {self.key: score_table(scores)} if scores else {}
        sections = [Section("Scores", [_BASELINE] if scores else [], tables)]
        sections.append(Section("Not available", missing))
        for result in self.found.results.values():
            shown = {stem: image for stem, image in result.images.items() if "/" not in stem}
            title = result.title if result.tables or shown else ""
            notes = [result.note] if result.note else []
            sections.append(Section(title, notes, result.tables, shown))
        sheets = {title: _sheet(chosen) for title, chosen in self.best_and_worst().items()}
        return [*sections, Section("Images", images=sheets)]

    def best_and_worst(self, *, count: int = 12) -> dict[str, Chosen]:
        """Choose the first images, and those with the highest and lowest CLIP score, by title."""
        if self.folder is None:
            return {}
        rows = self.folder.rows
        chosen: dict[str, Chosen] = {"the first": [(row, None) for row in rows[:count]]}
        if name := next((name for name in self.rows if name.startswith("clip_score")), None):
            order, values = self.rows[name].argsort(stable=True).tolist(), self.rows[name].tolist()
            for word, places in (("highest", order[: -count - 1 : -1]), ("lowest", order[:count])):
                chosen[f"{word} {name}"] = [(rows[k], values[k]) for k in places]
        return chosen


def collect(
    found: Results,
    measurements: Mapping[str, Measurement],
    context: Context,
    *,
    model: str | Path | None,
    seconds: float,
) -> Report:
    """Write all images to OUT/images and collect the content of results.json.

    `model` is the bundle's folder and `seconds` the duration of the whole evaluation.
    """
    paths = []
    for result in found.results.values():
        result.images = {
            stem: save_png(cast(Image.Image, image), context.out / "images" / f"{stem}.png")
            for stem, image in result.images.items()
        }
        paths += map(str, result.images.values())
    folder, protocol = context.found("folder").get(()), context.protocol
    count = 0 if folder is None else len(folder.rows)
    sources, networks = context.found("_source"), context.found("network")
    device = context.device
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{device.type} {platform.machine()}"
    results: dict[str, Any] = {
        "format": FORMAT,
        "model": str(model) if context.given is None else None,
        "data": str(context.data),
        "key": None if folder is None else protocol.key(context.fingerprint, count),
        "n": count,
        "n_reference": 0 if folder is None else len(context.reference),
        "generated": None if folder is None else str(folder.path),
        "bad_samples": {split: one.bad for (split, _), one in sources.items() if one.bad},
        "protocol": protocol.describe(),
        "made_with": {} if folder is None else folder.settings,
        "scores": {name: score.plain() for name, score in found.scores.items()},
        "not_available": found.not_available,
        "networks": {name: network.fingerprint for (name,), network in networks.items()},
        "seed": context.seed,
        "sampling": asdict(context.settings),
    }
    for result in found.results.values():
        _merge(results, result.values)
    results |= {
        "tables": {
            name: {title: table._asdict() for title, table in result.tables.items()}
            for name, result in found.results.items()
            if result.tables
        },
        "paths": paths,
        "settings": {name: asdict(cast(Any, measurements[name])) for name in found.results},
        "seconds": {k: round(v, 1) for k, v in (found.seconds | {"total": seconds}).items()},
        "versions": package_versions(),
        "device": name,
        "threads": torch.get_num_threads(),
    }
    return Report(results, found, folder)


def publish(
    report: Report, out: Path, *, sweep: bool = False, loggers: Sequence[Any] = ()
) -> float | None:
    """Write the report to OUT, print its tables, and return the protocol's main number.

    If OUT is one job of a sweep, a summary of the sweep is written to its parent. `loggers` are
    Lightning's.
    """
    path, page = write_results(report.results, out / "results.json"), out / "report.html"
    write_samples(report, out / "samples.csv")
    write_text(page, render_report(report))
    for logger in loggers:
        log_report(logger, report)
    print(f"{summarize(report)}\n\nresults: {path}\nreport: {page}")
    if sweep:
        curves = write_curves(out.parent)
        write_text(out.parent / page.name, render(f"Sweep of {out.parent.name}", curves))
        print(f"sweep: {out.parent / page.name}")
    return main_score(report.results)


def write_results(results: Mapping[str, Any], path: Path) -> Path:
    """Write results as strict JSON, atomically; a number that is not finite becomes null."""
    text = json.dumps(_finite(results), indent=2, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")
    return path


def write_samples(report: Report, path: Path) -> None:
    """Write one CSV row per image of the protocol: id, prompt, seed, file, and its own scores."""
    if report.folder is None:
        return
    columns, rows = report.rows, []
    for k, row in enumerate(report.folder.rows):
        values = [f"{float(column[k]):.6g}" for column in columns.values()]
        rows.append([row.id, row.prompt, row.seed, row.path.as_posix(), *values])
    write_csv(Table(["id", "prompt", "seed", "file", *columns], rows), path)


def main_score(results: Mapping[str, Any]) -> float | None:
    """Return the distance in the protocol's own network, which a sweep would minimize."""
    network = results["protocol"]["network"]
    score = results["scores"].get("fid" if network == "inception" else f"fd_{network}")
    return None if score is None else score["value"]


def render_report(report: Report) -> str:
    """Render an evaluation's page."""
    results = report.results
    about = Section(notes=[_about(results)] if results["key"] else [])
    sections = [about, *report.sections, Section("Settings", tables={"": _settings(results)})]
    return render(f"Evaluation of {results['model'] or results['generated']}", sections)


def _about(results: Mapping[str, Any]) -> str:
    """Describe the protocol."""
    protocol = results["protocol"]
    left_out = "".join(
        f" {sum(kinds.values())} bad samples of {split} were left out."
        for split, kinds in results.get("bad_samples", {}).items()
    )
    return (
        f"Protocol {protocol['name']}: {results['n']:,} images of {protocol['resolution']} px, "
        f"captions of {protocol['split']} ({protocol['captions'].replace('_', ' ')}), compared "
        f"with {results['n_reference']:,} images of {protocol['reference']}.{left_out} Only "
        f"numbers with the same key are comparable: {results['key']}"
    )


def _settings(results: Mapping[str, Any]) -> Table:
    """Return what the numbers depend on."""
    made = {name: value for name, value in results["made_with"].items() if name != "protocol"}
    for stage, sampling in made.pop("sampling", {}).items():
        words = ", ".join(f"{name} {value}" for name, value in sampling.items())
        made[f"{stage} sampled with"] = words
    made |= {f"protocol.{name}": value for name, value in results["protocol"].items()}
    made |= {**results["versions"], "device": results["device"], "seconds": results["seconds"]}
    return Table(["setting", "value"], [[name, str(value)] for name, value in made.items()])


def summarize(report: Report) -> str:
    """Return the text that is printed at the end: all tables, what is missing, image paths."""
    results = report.results
    parts = [
        f"{title}\n{format_table(table)}"
        for section in report.sections
        for title, table in section.tables.items()
    ]
    parts += not_available(results["not_available"])
    if results["paths"]:
        parts.append("\n".join(["images:", *(f"  {path}" for path in results["paths"])]))
    parts.append(f"evaluated in {timedelta(seconds=round(results['seconds']['total']))}")
    return "\n\n".join(parts)


def log_report(logger: Any, report: Report) -> None:
    """Log scores by their key and, if the logger can, all tables and images of the report."""
    results, key = report.results, report.key
    logger.log_hyperparams({"key": key, **results["protocol"], "made_with": results["made_with"]})
    logger.log_metrics({f"{key}/{name}": one["value"] for name, one in results["scores"].items()})
    for section in report.sections:
        if hasattr(logger, "log_table"):
            for title, table in section.tables.items():
                logger.log_table(key=f"{key}/{title}", columns=table.head, data=table.rows)
        if hasattr(logger, "log_image"):
            for title, image in section.images.items():
                shown = str(image) if isinstance(image, Path) else image
                logger.log_image(key=f"{key}/{title}", images=[shown])
    logger.save()
    logger.finalize("success")


def _sheet(chosen: Chosen) -> Image.Image:
    """Draw a contact sheet of images with their scores and prompts."""
    tiles = []
    for row, number in chosen:
        words = row.prompt or row.id
        caption = words if number is None else f"{number:.1f}: {words}"
        tiles.append(Tile(to_tensor(open_image(row.path)), caption))
    return contact_sheet(tiles, columns=6, size=150)


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Merge nested values key by key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            _merge(into.setdefault(key, {}), value)
        else:
            into[key] = value


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
