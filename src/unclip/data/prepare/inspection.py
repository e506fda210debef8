"""Inspect every image once: whether it can be decoded, its size, and duplicates."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from unclip.data.bad_samples import BadSample
from unclip.data.prepare.resumable import run_jobs
from unclip.data.reader import decode_image
from unclip.data.shards import MAX_IMAGE_BYTES

IMAGES_PER_JOB = 64
RESULTS = "inspected.jsonl"


class Record(NamedTuple):
    """An image with captions.

    Attributes:
        source: unique name of the image in the data that it comes from.
        path: the image file.
        captions: one or more captions, none of them blank.
        split: train, val or test if the data has splits, else None.
    """

    source: str
    path: Path
    captions: tuple[str, ...]
    split: str | None = None

    @property
    def key(self) -> str:
        """A unique sample name of letters, digits and underscores.

        Dots and slashes have a meaning in shards, and a hyphen marks a twin (`unclip.data.order`).
        """
        stem = re.sub(r"[^0-9A-Za-z]+", "_", Path(self.source).stem)[:40].strip("_")
        digest = hashlib.blake2b(self.source.encode(), digest_size=6).hexdigest()
        return f"{stem}_{digest}" if stem else digest


class Rejected(NamedTuple):
    """An image, or a table row, that is not imported, and the reason."""

    source: str
    reason: str
    detail: str = ""


class Listing(NamedTuple):
    """The images that a reader found, and the ones that it rejected."""

    records: list[Record]
    rejected: list[Rejected]


class ImageInfo(NamedTuple):
    """The result of inspecting an image file.

    Attributes:
        state: size and modification time of the file.
        width: width in pixels after the EXIF rotation.
        height: height in pixels after the EXIF rotation.
        digest: hash of the decoded pixels.
        problem: reason and detail if the image cannot be used, else None.
    """

    state: tuple[int, int]
    width: int = 0
    height: int = 0
    digest: str = ""
    problem: tuple[str, str] | None = None


class Accepted(NamedTuple):
    """An image that is imported."""

    record: Record
    info: ImageInfo


def inspect(
    records: Sequence[Record],
    folder: Path,
    *,
    smallest: int,
    workers: int | None,
    progress: bool = True,
) -> tuple[list[Accepted], list[Rejected]]:
    """Decode every image and accept or reject it; the first of several equal images is accepted.

    Results are stored in FOLDER/inspected.jsonl, so an interrupted inspection resumes and only
    changed files are decoded again.

    Args:
        records: images with captions.
        folder: folder of the stored results.
        smallest: smallest width and height in pixels.
        workers: number of processes; None for one per core, 0 to run in this process.
        progress: whether to show a progress bar.
    """
    known = dict(_stored(folder / RESULTS))
    new = [r for r in records if r.source not in known or known[r.source].state != _state(r.path)]
    parts = [new[start : start + IMAGES_PER_JOB] for start in range(0, len(new), IMAGES_PER_JOB)]
    jobs = [(_inspect_files, ([record.path for record in part],)) for part in parts]
    with (
        tqdm(total=len(records), desc="images", unit="image", disable=not progress) as bar,
        open(folder / RESULTS, "a", encoding="utf-8") as file,
    ):
        bar.update(len(records) - len(new))
        for number, results in run_jobs(jobs, workers):
            for record, info in zip(parts[number], results, strict=True):
                known[record.source] = info
                file.write(json.dumps([record.source, *info]) + "\n")
            file.flush()
            bar.update(len(results))
    return _sort([Accepted(record, known[record.source]) for record in records], smallest)


def _sort(found: list[Accepted], smallest: int) -> tuple[list[Accepted], list[Rejected]]:
    accepted, rejected, first = [], [], {}
    for record, info in found:
        if info.problem is not None:
            rejected.append(Rejected(record.source, *info.problem))
        elif min(info.width, info.height) < smallest:
            size = f"{info.width} × {info.height} pixels"
            rejected.append(Rejected(record.source, "image too small", size))
        elif info.digest in first:
            rejected.append(Rejected(record.source, "duplicate", f"of {first[info.digest]}"))
        else:
            first[info.digest] = record.source
            accepted.append(Accepted(record, info))
    return accepted, rejected


def _inspect_files(paths: Sequence[Path]) -> list[ImageInfo]:
    return [_inspect_file(path) for path in paths]


def _inspect_file(path: Path) -> ImageInfo:
    """Decode an image; any defect of the file is returned as its `problem`."""
    state = _state(path)
    if state[0] > MAX_IMAGE_BYTES:
        return ImageInfo(state, problem=("oversize file", f"{state[0]} bytes"))
    try:
        image = decode_image(path.read_bytes(), path.suffix[1:].lower(), minimum_size=1)
    except BadSample as bad:
        return ImageInfo(state, problem=(bad.kind, bad.detail))
    except OSError as error:
        return ImageInfo(state, problem=("unreadable file", error.strerror or str(error)))
    shape = b"%d %d " % image.size
    digest = hashlib.blake2b(shape + image.tobytes(), digest_size=16).hexdigest()
    return ImageInfo(state, *image.size, digest)


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_size, found.st_mtime_ns)


def _stored(path: Path) -> Iterator[tuple[str, ImageInfo]]:
    if not path.is_file():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                source, state, width, height, digest, problem = json.loads(line)
            except ValueError:  # an incomplete line of an interrupted inspection
                continue
            yield source, ImageInfo(tuple(state), width, height, digest, problem and tuple(problem))
