"""results.json: every number of an evaluation with what it depends on."""

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from unclip.contact_sheet import Tile, contact_sheet
from unclip.evaluation.context import Context
from unclip.evaluation.generation import GeneratedImage, ImageFolder
from unclip.evaluation.measurement import Measurement, Results
from unclip.evaluation.report.tables import Section, not_available, score_table
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
        return {
            name: score.rows
            for name, score in self.found.scores.items()
            if score.rows is not None and len(score.rows) == count
        }

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
        for name, column in self.rows.items():
            if name.startswith("clip_score"):
                order, values = column.argsort(stable=True).tolist(), column.tolist()
                chosen[f"highest {name}"] = [(rows[k], values[k]) for k in reversed(order[-count:])]
                chosen[f"lowest {name}"] = [(rows[k], values[k]) for k in order[:count]]
                break
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
        saved = {}
        for stem, image in result.images.items():
            saved[stem] = save_png(cast(Image.Image, image), context.out / "images" / f"{stem}.png")
        result.images = saved
        paths += map(str, saved.values())
    folder, protocol = context.opened_folder, context.protocol
    count = 0 if folder is None else len(folder.rows)
    results: dict[str, Any] = {
        "format": FORMAT,
        "model": str(model) if context.given is None else None,
        "data": str(context.data),
        "key": None if folder is None else protocol.key(context.fingerprint, count),
        "n": count,
        "n_reference": 0 if folder is None else len(context.reference),
        "generated": None if folder is None else str(folder.path),
        "bad_samples": context.bad_samples,
        "protocol": protocol.describe(),
        "made_with": {} if folder is None else folder.settings,
        "scores": {name: score.plain() for name, score in found.scores.items()},
        "not_available": found.not_available,
        "networks": context.used_networks,
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
        **environment(context.device),
    }
    return Report(results, found, folder)


def environment(device: torch.device) -> dict[str, Any]:
    """Return package versions and the machine that computed on `device`."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{device.type} {platform.machine()}"
    return {"versions": package_versions(), "device": name, "threads": torch.get_num_threads()}


def write_results(results: Mapping[str, Any], path: Path) -> Path:
    """Write results as strict JSON, atomically; a number that is not finite becomes null."""
    text = json.dumps(_finite(results), indent=2, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")
    return path


def main_score(results: Mapping[str, Any]) -> float | None:
    """Return the distance in the protocol's own network, which a sweep would minimize."""
    network = results["protocol"]["network"]
    score = results["scores"].get("fid" if network == "inception" else f"fd_{network}")
    return None if score is None else score["value"]


def _sheet(chosen: Chosen) -> Any:
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
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
