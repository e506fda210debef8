"""MODEL_CARD.md: what a bundle knows, how it was trained, and how well it works."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from unclip.bundle import SIZES, read_metadata, weight_bytes
from unclip.emoji import COLORS, concepts
from unclip.files import read_json, read_text, write_text

CARD = "MODEL_CARD.md"


class Number(NamedTuple):
    """A number of results.json, with its keys there as name, its 95% interval and its count.

    `real` is the same number for real images (for bicubic enlargement in PSNR and SSIM).
    """

    name: str
    value: float
    interval: tuple[float, float] | None
    real: float | None
    n: int

    @property
    def fails(self) -> bool:
        """Whether a share of right images is well below that of real images."""
        if ".generated." not in self.name or self.real is None or self.interval is None:
            return False
        return self.value < 0.9 * self.real and self.interval[1] < self.real


def write_model_card(folder: Path, results: Path | None = None) -> Path:
    """Write the card of a bundle, and return its path.

    `results` is results.json of its evaluation, by default the one in the bundle, if there is one.
    The text of NOTES.md next to it, if there is one, is added to the known failures.
    """
    from jinja2 import Environment, PackageLoader

    files = sorted(folder.glob("*.safetensors"), key=lambda path: (path.stem == "judge", path.stem))
    stages = {file.stem: read_metadata(file) for file in files}
    extra = [stage.extra for stage in stages.values()]
    results = folder / "results.json" if results is None else results
    measured = read_json(results) if results.is_file() else {}
    notes = results.with_name("NOTES.md")
    sets = sorted(_distinct(extra, "concept_set"), key="SML".find)
    environment = Environment(
        loader=PackageLoader("unclip", ""), trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    card = environment.get_template("model_card.md.j2").render(
        name=folder.resolve().name,
        stages=stages,
        parameters={file.stem: weight_bytes(file) / 4e6 for file in files},
        size=max(size for name, size in SIZES.items() if name in {"decoder", *stages}),
        seconds=sum(float(one.get("seconds", 0)) for one in extra),
        data=_distinct(extra, "data"),
        licenses=_distinct(extra, "license"),
        commits=_distinct(extra, "commit"),
        commands=_distinct(extra, "command"),
        concepts=concepts(sets[-1]) if sets else (),
        colors=list(COLORS),
        key=measured.get("key"),
        numbers=list(_numbers(measured)),
        notes=read_text(notes).strip() if notes.is_file() else "",
    )
    write_text(folder / CARD, card)
    return folder / CARD


def _distinct(extra: list[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(str(one[key]) for one in extra if one.get(key)))


def _numbers(results: Mapping[str, Any]) -> Iterator[Number]:
    """Yield the numbers about generated images, each with its counterpart for real images."""
    entries = dict(_entries("", results))
    for name, entry in entries.items():
        if name.startswith("scores."):
            real = entry.get("real")
        elif ".generated." in name:
            real = entries.get(name.replace(".generated.", ".real."), {}).get("share")
        elif "psnr" in entry:
            for key in ("psnr", "ssim"):
                yield Number(f"{name}.{key}", entry[key], None, entry[f"{key}_bicubic"], entry["n"])
            continue
        else:
            continue
        value = entry["value"] if "value" in entry else entry["share"]
        yield Number(name, value, tuple(entry["interval"]), real, entry["n"])


def _entries(name: str, node: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each dict of a nested dict that holds a measurement, with its dotted name."""
    if "n" in node and (node.get("interval") or "psnr" in node):
        yield name, node
        return
    for key, child in node.items():
        if isinstance(child, Mapping):
            yield from _entries(f"{name}.{key}" if name else key, child)
