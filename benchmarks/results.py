"""The JSON file and the Markdown tables of every benchmark; `results.py FOLDER` joins them."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from unclip.files import write_text
from unclip.provenance import code_version

FORMAT = 3


def write_results(path: Path, benchmark: str, **results: Any) -> None:
    """Write results with the machine and the versions that they were measured on."""
    machine = {"device": device_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    head = {"format": FORMAT, "benchmark": benchmark, "machine": machine}
    written = {**head, "versions": code_version(), **results}
    write_text(path, json.dumps(written, indent=2, default=str) + "\n")


def device_name() -> str:
    """Return the name of the GPU or, without one, of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "cpu")


def markdown(rows: list[dict[str, Any]]) -> str:
    """Format rows with the same keys as a Markdown table."""
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    padded = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return "–" if value is None else str(value)


def join(folder: Path) -> None:
    """Write all.json and all.md, which have the results of the other files in a folder."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("[!a]*.json"))}
    write_text(folder / "all.json", json.dumps(found, indent=2) + "\n")
    parts = [f"## {name}\n\n{markdown(results['rows'])}\n" for name, results in found.items()]
    device = next(iter(found.values()))["machine"]["device"]
    write_text(folder / "all.md", "\n".join([f"# {device}\n", *parts]))


if __name__ == "__main__":
    join(Path(sys.argv[1]))
