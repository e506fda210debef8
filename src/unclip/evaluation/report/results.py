"""results.json: every number of an evaluation with what it depends on."""

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from unclip.evaluation.context import Context
from unclip.evaluation.generation import GeneratedImage, ImageFolder
from unclip.evaluation.measurement import Measurement, Result, Results
from unclip.files import write_text
from unclip.images import save_png
from unclip.provenance import package_versions

FORMAT = 2

Chosen = list[tuple[GeneratedImage, float | None]]


@dataclass
class Report:
    """An evaluation's outcome, ready to be written.

    Attributes:
        results: the content of results.json.
        found: the results of all measurements.
        titles: heading of each measurement.
        folder: the protocol's images; None if no measurement needed them.
        images: paths of each measurement's images.
    """

    results: dict[str, Any]
    found: Results
    titles: Mapping[str, str] = field(default_factory=dict)
    folder: ImageFolder | None = None
    images: dict[str, list[Path]] = field(default_factory=dict)

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

    def best_and_worst(self, *, count: int = 12) -> dict[str, Chosen]:
        """Choose the first images, and those with the highest and lowest CLIP score.

        Args:
            count: number of images under each title.
        """
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

    Args:
        found: the results.
        measurements: the measurements by name.
        context: what they measured.
        model: folder of the bundle.
        seconds: duration of the whole evaluation.
    """
    images = {
        name: _save_images(result, context.out / "images")
        for name, result in found.results.items()
        if result.images
    }
    results: dict[str, Any] = {
        "format": FORMAT,
        "model": None if context.cascade is None else str(model),
        "data": str(context.data),
        **_describe_protocol(context),
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
        "paths": [str(path) for paths in images.values() for path in paths],
        "settings": {name: asdict(measurements[name]) for name in found.results},
        "seconds": {k: round(v, 1) for k, v in (found.seconds | {"total": seconds}).items()},
        **environment(context.device),
    }
    titles = {name: measurements[name].title or name for name in found.results}
    return Report(results, found, titles, context.opened_folder, images)


def _describe_protocol(context: Context) -> dict[str, Any]:
    """Return the protocol, and the folder of its images if a measurement needed them."""
    folder, protocol = context.opened_folder, context.protocol
    count = 0 if folder is None else len(folder.rows)
    return {
        "key": None if folder is None else protocol.key(context.fingerprint, count),
        "n": count,
        "n_reference": 0 if folder is None else len(context.reference),
        "generated": None if folder is None else str(folder.path),
        "protocol": protocol.describe(),
        "made_with": {} if folder is None else folder.settings,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Return package versions and the machine that computed on `device`."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{device.type} {platform.machine()}"
    return {"versions": package_versions(), "device": name, "threads": torch.get_num_threads()}


def write_results(results: Mapping[str, Any], path: str | Path) -> Path:
    """Write results as strict JSON, atomically; a number that is not finite becomes null."""
    text = json.dumps(_finite(results), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_text(Path(path), text)
    return Path(path)


def main_score(results: Mapping[str, Any]) -> float | None:
    """Return the distance in the protocol's own network, which a sweep would minimize."""
    network = results["protocol"]["network"]
    score = results["scores"].get("fid" if network == "inception" else f"fd_{network}")
    return None if score is None else score["value"]


def _save_images(result: Result, folder: Path) -> list[Path]:
    """Write the images of a result that are not files yet."""
    return [
        image if isinstance(image, Path) else save_png(image, folder / f"{stem}.png")
        for stem, image in result.images.items()
    ]


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Merge nested values key by key."""
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif isinstance(value, Mapping):
            into[key] = dict(value)
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
