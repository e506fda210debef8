"""Build a data set of one's own pictures: examine them, hold some out, write shards of each size.

The same pictures and settings give the same bytes with any number of processes. A build that was
cut off goes on where it stopped: a file appears under its name only when it is whole.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from unclip.data.own.entries import Found
from unclip.data.own.examine import Good, examine
from unclip.data.own.report import write_report
from unclip.data.own.shards import write_shard
from unclip.data.parallel import run_jobs
from unclip.files import atomic_write

KIND = "own pictures"
UNFINISHED, FINISHED = "building.json", "dataset.json"
MOST_HELD_OUT = 5000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a data set is made of pictures.

    Args:
        sizes: sides of the squares; each gets the pictures that are at least as large.
        val: pictures that are held out where the data has no splits; None for 5%, at most 5000.
        shard_size: pictures of a shard, at most.
        seed: of the order and of what is held out.
    """

    sizes: tuple[int, ...] = (64, 256, 1024)
    val: int | None = None
    shard_size: int = 1000
    seed: int = 0

    def __post_init__(self):
        if not self.sizes or min(self.sizes) < 16 or len(set(self.sizes)) != len(self.sizes):
            raise ValueError(f"sizes are {self.sizes}: they differ and are at least 16 pixels")
        if self.shard_size < 1 or (self.val is not None and self.val < 0):
            raise ValueError(f"shard_size {self.shard_size}, val {self.val}: out of range")


def build(
    found: Found,
    root: str | Path,
    settings: Settings,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> str:
    """Write the data set into `root`, or finish it there; returns a summary.

    Args:
        found: the pictures, by `read_folder` or `read_coco`.
        root: the data set's own folder.
        settings: see `Settings`.
        workers: processes; None takes one a core, 0 stays in this one.
        overwrite: replace the shards that other pictures or settings left in `root`.
        progress: show progress bars.

    Raises:
        ValueError: nothing is left to train on, or `root` holds something else than this data set.
    """
    root = Path(root)
    _check_foreign(root)
    root.mkdir(parents=True, exist_ok=True)
    good, dropped = examine(
        found.entries, root, smallest=min(settings.sizes), workers=workers, progress=progress
    )
    splits = _split(good, settings)
    plan = list(_plan(root, splits, settings))
    kept = {split: {} for split in splits}
    for path, pictures, size in plan:
        split = path.parts[-3]
        kept[split][size] = kept[split].get(size, 0) + len(pictures)
    summary = write_report(root, kept, [*found.dropped, *dropped])
    if not splits.get("train"):
        raise ValueError(f"{summary}\nno picture is left to train on")
    record = _record(splits, settings)
    _prepare(root, record, overwrite)
    jobs = [(write_shard, job) for job in plan]
    sums = {}
    with tqdm(total=len(plan), desc="shards", unit="shard", disable=not progress) as bar:
        for number, digest in run_jobs(jobs, workers):
            sums[plan[number][0].relative_to(root).as_posix()] = digest
            bar.update()
    _finish(root, record, sums)
    return summary


def _split(good: Sequence[Good], settings: Settings) -> dict[str, list[Good]]:
    """The pictures of each split, in an order by chance that is a function of seed and source."""

    def chance(picture: Good) -> str:
        text = f"{settings.seed}/{picture.entry.source}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    order = sorted(good, key=chance)
    if any(picture.entry.split for picture in order):
        splits: dict[str, list[Good]] = {}
        for picture in order:
            splits.setdefault(picture.entry.split or "train", []).append(picture)
        return dict(sorted(splits.items()))
    val = settings.val
    if val is None:
        val = min(max(round(0.05 * len(order)), 1), MOST_HELD_OUT)
    if val >= len(order) > 0:
        raise ValueError(f"{val} pictures to hold out of {len(order)} leave none to train on")
    return {"train": order[val:], "val": order[:val]}


def _plan(
    root: Path, splits: dict[str, list[Good]], settings: Settings
) -> Iterator[tuple[Path, list[Good], int]]:
    """(path, pictures, size) of each shard; those of a size are about equally large."""
    for split, pictures in splits.items():
        for size in settings.sizes:
            large = [good for good in pictures if min(good.width, good.height) >= size]
            shards = -(-len(large) // settings.shard_size)
            for number in range(shards):
                part = slice(len(large) * number // shards, len(large) * (number + 1) // shards)
                yield root / split / str(size) / f"{number:05d}.tar", large[part], size


def _record(splits: dict[str, list[Good]], settings: Settings) -> dict:
    digest = hashlib.sha256()
    for split, pictures in splits.items():
        for good in pictures:
            line = [split, good.entry.source, good.entry.captions, good.digest]
            digest.update(json.dumps(line).encode())
    return {
        "data": KIND,
        **{name: list(v) if name == "sizes" else v for name, v in asdict(settings).items()},
        "pictures": {split: len(pictures) for split, pictures in splits.items()},
        "digest": digest.hexdigest(),
    }


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _found(root: Path) -> dict:
    """The record of the data set that is in `root`, finished or not."""
    return _read(root / FINISHED).get("settings") or _read(root / UNFINISHED)


def _check_foreign(root: Path) -> None:
    known = _found(root).get("data") == KIND or (root / "examined.jsonl").is_file()
    if root.exists() and not known and any(root.iterdir()):
        raise ValueError(f"{root} holds something else: choose another folder")


def _prepare(root: Path, record: dict, overwrite: bool) -> None:
    found = _found(root)
    if found and found != record:
        if not overwrite:
            changed = [name for name in record if found.get(name) != record[name]]
            raise ValueError(
                f"{root} was built of other pictures or settings ({', '.join(changed)} differ): "
                "choose another folder, or replace it with --overwrite"
            )
        for split in found["pictures"]:
            shutil.rmtree(root / split, ignore_errors=True)
    with atomic_write(root / UNFINISHED) as path:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (root / FINISHED).unlink(missing_ok=True)


def _finish(root: Path, record: dict, sums: dict[str, str]) -> None:
    for left_over in root.glob("*/*/.*.tmp"):
        left_over.unlink()
    with atomic_write(root / FINISHED) as path:
        content = {"settings": record, "sha256": dict(sorted(sums.items()))}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (root / UNFINISHED).unlink()
