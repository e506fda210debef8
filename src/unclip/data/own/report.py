"""What became of somebody's data: report.json and dropped.csv beside the shards, and a summary."""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from unclip.data.own.entries import Dropped
from unclip.files import atomic_write


def write_report(root: Path, kept: dict[str, dict[int, int]], dropped: Sequence[Dropped]) -> str:
    """Write the report's two files and return the summary.

    Args:
        root: the data set's folder.
        kept: split → size → pictures.
        dropped: what was left out.
    """
    reasons = Counter(one.reason for one in dropped)
    with atomic_write(root / "report.json") as path:
        content = {"kept": kept, "dropped": dict(reasons.most_common())}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with (
        atomic_write(root / "dropped.csv") as path,
        open(path, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(Dropped._fields)
        writer.writerows(dropped)
    lines = [f"{root}:"]
    for split, sizes in kept.items():
        of = " · ".join(f"{count} at {size} px" for size, count in sizes.items())
        lines.append(f"  {split}: {of}")
    if dropped:
        lines.append(f"  dropped {len(dropped)} (each with its reason in {root / 'dropped.csv'}):")
        lines += [f"    {count} × {reason}" for reason, count in reasons.most_common()]
    return "\n".join(lines)
