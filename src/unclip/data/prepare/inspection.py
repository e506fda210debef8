"""Inspect every image once: whether it can be decoded, its size, and duplicates."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from unclip.data.bad_samples import BadSample
from unclip.data.prepare.listing import Record, Rejected
from unclip.data.prepare.resumable import run_jobs
from unclip.data.reader import decode_image
from unclip.files import parse_json, read_bytes, read_text, split_lines

RESULTS = "inspected.jsonl"


class ImageInfo(NamedTuple):
    """The result of inspecting an image file."""

    bytes: int  # size of the file
    modified: int  # modification time of the file in nanoseconds
    width: int = 0  # in pixels, after the EXIF rotation
    height: int = 0
    digest: str = ""  # hash of the decoded pixels
    reason: str = ""  # why the image cannot be used, or ""
    detail: str = ""


class Accepted(NamedTuple):
    """An image that is imported."""

    record: Record
    info: ImageInfo


def inspect(
    records: Sequence[Record], folder: Path, *, smallest: int, workers: int | None
) -> tuple[list[Accepted], list[Rejected]]:
    """Decode every image and accept or reject it; the first of several equal images is accepted.

    Results are stored in FOLDER/inspected.jsonl, so an interrupted inspection resumes and only
    changed files are decoded again. `smallest` is the smallest width and height in pixels;
    `workers` is that of `run_jobs`.
    """
    known = dict(_stored(folder / RESULTS))
    new = [r for r in records if r.source not in known or known[r.source][:2] != _state(r.path)]
    paths = [record.path for record in new]
    results = run_jobs(_inspect_file, paths, workers, about="images", chunk_size=64)
    with open(folder / RESULTS, "a", encoding="utf-8", buffering=1) as file:
        for record, info in zip(new, results, strict=True):
            known[record.source] = info
            file.write(json.dumps([record.source, *info]) + "\n")
    accepted, rejected, first = [], [], {}
    for record in records:
        info = known[record.source]
        if info.reason:
            rejected.append(Rejected(record.source, info.reason, info.detail))
        elif min(info.width, info.height) < smallest:
            size = f"{info.width} × {info.height} pixels"
            rejected.append(Rejected(record.source, "image too small", size))
        elif info.digest in first:
            rejected.append(Rejected(record.source, "duplicate", f"of {first[info.digest]}"))
        else:
            first[info.digest] = record.source
            accepted.append(Accepted(record, info))
    return accepted, rejected


def _inspect_file(path: Path) -> ImageInfo:
    """Decode an image; any defect of the file is returned as the `reason`."""
    state = _state(path)
    try:
        image = decode_image(read_bytes(path), minimum_size=1)
    except BadSample as bad:
        return ImageInfo(*state, reason=bad.kind, detail=bad.detail)
    except (OSError, ValueError) as error:
        return ImageInfo(*state, reason="unreadable file", detail=str(error))
    shape = b"%d %d " % image.size
    digest = hashlib.blake2b(shape + image.tobytes(), digest_size=16).hexdigest()
    return ImageInfo(*state, *image.size, digest)


def _state(path: Path) -> tuple[int, int]:
    """Return the size and the modification time of a file, which show whether it changed."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_size, found.st_mtime_ns)


def _stored(path: Path) -> Iterator[tuple[str, ImageInfo]]:
    for line in split_lines(read_text(path)) if path.is_file() else ():
        with contextlib.suppress(ValueError, TypeError):  # a line cut off by an interruption
            source, *info = parse_json(line, path)
            yield source, ImageInfo(*info)
