"""results.json, written whole or not at all, and the tables that are printed from it."""

import json
import math
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from unclip.evaluation.probe_tables import probe_tables

_PACKAGES = ("unclip", "torch", "torchmetrics", "open_clip_torch", "timm", "pillow")


def write_results(results: dict[str, Any], path: str | Path) -> Path:
    """Write the results as strict JSON: beside their place first, then renamed into it.

    A number that is not finite becomes null, which every JSON reader takes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(results), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def surroundings(device: torch.device) -> dict[str, Any]:
    """Versions and the machine that computed on `device`, as they belong into every result."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{device.type} {platform.machine()}"
    return {"versions": versions, "device": name, "threads": torch.get_num_threads()}


def table(rows: Sequence[Sequence[Any]], *, head: Sequence[str]) -> str:
    """Columns padded to one width each: words to the left, numbers to the right."""
    cells = [[cell_text(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    numeric = [all(_is_number(row[k]) for row in rows) for k in range(len(head))]

    def line(words: Sequence[str]) -> str:
        padded = [
            word.rjust(width) if right else word.ljust(width)
            for word, width, right in zip(words, widths, numeric, strict=True)
        ]
        return "  ".join(padded).rstrip()

    rule = ["─" * width for width in widths]
    return "\n".join([line(head), line(rule), *(line(row) for row in cells)])


def summary(results: dict[str, Any]) -> str:
    """What is printed at the end: a line a stage, the key numbers, and where the pictures are."""
    parts = [*score_table(results)]
    if results.get("stages"):
        parts.append(stage_table(results))
    parts += measure_tables(results)
    parts += limit_parts(results.get("limits", {}))
    if missing := by_reason(results.get("not_available", {})):
        parts.append("\n".join(f"not available: {names}: {why}" for why, names in missing.items()))
    if left_out := results.get("left_out"):
        parts.append("\n".join(f"left out: {name}: {why}" for name, why in left_out.items()))
    if paths := results.get("paths"):
        parts.append("\n".join(["pictures:", *(f"  {path}" for path in paths)]))
    parts.append(f"evaluated in {_duration(results['seconds']['total'])}")
    return "\n\n".join(parts)


LIMIT_HEAD = ["limit", "score", "value", "±", "real", "better", "n", "n real"]


def limit_rows(limits: dict[str, Any]) -> list[list[Any]]:
    """The limits' scores, those of real pictures beside them."""
    return [
        [limit, name, *(score[key] for key in ("value", "error", "real", "better", "n", "n_real"))]
        for limit, measured in limits.items()
        for name, score in measured["scores"].items()
    ]


def limit_parts(limits: dict[str, Any]) -> list[str]:
    """The limits beside real pictures, why one has no numbers, and where their pictures are."""
    parts = []
    if rows := limit_rows(limits):
        parts.append(table(rows, head=LIMIT_HEAD))
    for name, measured in limits.items():
        if why := measured.get("not_available"):
            parts.append(f"not available: {name}: {why}")
        if words := measured["about"].get("summary"):
            parts.append(words)
    if paths := [path for measured in limits.values() for path in measured["paths"]]:
        parts.append("\n".join(["pictures of limits:", *(f"  {path}" for path in paths)]))
    return parts


def by_reason(not_available: dict[str, str]) -> dict[str, str]:
    """The names that share a reason, in one line each."""
    names: dict[str, list[str]] = {}
    for name, why in not_available.items():
        names.setdefault(why, []).append(name)
    return {why: ", ".join(shared) for why, shared in names.items()}


def score_rows(results: dict[str, Any]) -> list[list[Any]]:
    """The protocol's scores: name, value, error, interval, the same of real pictures, counts."""
    rows = []
    for name, score in results.get("scores", {}).items():
        low, high = score["interval"] or (None, None)
        rows.append([name, score["value"], score["error"], low, high, score["real"]])
        rows[-1] += [score["better"], score["n"], score["n_reference"], score["n_real"]]
    return rows


SCORE_HEAD = ["score", "value", "±", "95% from", "to", "real", "better", "n", "against", "n real"]


def score_table(results: dict[str, Any]) -> list[str]:
    """The protocol's scores, under the key that says what they compare with."""
    if not (rows := score_rows(results)):
        return []
    return [f"{results['key']}\n{table(rows, head=SCORE_HEAD)}"]


def stage_table(results: dict[str, Any]) -> str:
    """A line a stage: how large it is, how long it trained, and the number that it is judged by."""
    rows = [
        [
            name,
            stage["parameters"] / 1e6,
            stage["steps"],
            stage["images"],
            _duration(stage["seconds"]),
            headline(name, results),
        ]
        for name, stage in results["stages"].items()
    ]
    return table(rows, head=["stage", "M parameters", "steps", "images", "trained", "result"])


def headline(stage: str, results: dict[str, Any]) -> str:
    """The number by which a stage is judged, in words; empty when it was not measured."""
    clip = results.get("clip", {}).get(stage)
    if clip:
        among = clip["among"]
        return f"recall@1 {clip['recall_at_1']:.3f}, @5 {clip['recall_at_5']:.3f} among {among}"
    measured = results.get(stage)
    if not measured or stage in ("clip", "judge"):
        return ""
    if stage == "prior":
        split, cosines = next(iter(measured.items()))
        return (
            f"cosine {cosines['cosine']:.3f} on {split} (own z_t {cosines['cosine_text']:.3f}, "
            f"shuffled {cosines['cosine_shuffled']:.3f})"
        )
    if stage == "decoder":
        found = measured["fd_effnet_lite0"]
        ours, real, untrained = (found[name]["distance"] for name in ("prior", "real", "untrained"))
        return (
            f"fd_effnet_lite0 {ours:.1f} (real {real:.1f}, untrained {untrained:.1f}) "
            f"at n={found['n']}"
        )
    return (
        f"PSNR {measured['psnr']:.2f} dB ({measured['psnr_gain']:+.2f} on bicubic), "
        f"SSIM {measured['ssim']:.3f} (bicubic {measured['ssim_bicubic']:.3f})"
    )


def measure_tables(results: dict[str, Any]) -> list[str]:
    """The Fréchet distances, the upsamplers' numbers and the probes of emoji scenes."""
    tables = []
    if decoder := results.get("decoder"):
        found = decoder["fd_effnet_lite0"]
        rows = [
            [source, entry["distance"], entry["error"], found["n"]]
            for source, entry in found.items()
            if source != "n"
        ]
        tables.append(table(rows, head=["pictures", "fd_effnet_lite0", "±", "n"]))
        if gap := decoder.get("prior_gap"):
            tables.append(table(gap_rows(gap), head=GAP_HEAD))
    if enlarged := enlargement_rows(results):
        tables.append(table(enlarged, head=ENLARGEMENT_HEAD))
    for probed in probe_tables(results):
        tables.append(f"{probed.title}\n{table(probed.rows, head=probed.head)}")
    return tables


_STARTS = {
    "real": "(real pictures)",
    "true_embedding": "true z_i",
    "prior": "the prior's z_i",
    "text_embedding": "z_t in its place",
    "caption_alone": "caption alone",
}


GAP_HEAD = ["decoder from", "fd_effnet_lite0", "±", "kid", "judge", "n"]


def gap_rows(gap: dict[str, Any]) -> list[list[Any]]:
    """What the decoder makes of each thing that it can start from."""
    return [
        [words, *(gap[name].get(key) for key in ("distance", "error", "kid", "judge")), gap["n"]]
        for name, words in _STARTS.items()
    ]


ENLARGEMENT_HEAD = [
    "upsampler",
    "psnr",
    "bicubic",
    "ssim",
    "bicubic",
    "fd_crops",
    "bicubic",
    "n",
    "crops",
]


def enlargement_rows(results: dict[str, Any]) -> list[list[Any]]:
    """Each upsampler next to bicubic: PSNR, SSIM, Fréchet distance of crops to the true images."""
    rows = []
    for stage in ("upsampler_256", "upsampler_1024"):
        if found := results.get(stage):
            distance = found.get("fd_crops", {})
            names = ("psnr", "psnr_bicubic", "ssim", "ssim_bicubic")
            values = [distance.get(name, {}).get("distance") for name in ("upsampler", "bicubic")]
            counts = [found["n"], distance.get("n")]
            rows.append([stage, *(found[name] for name in names), *values, *counts])
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def cell_text(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
