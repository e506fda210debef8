"""Look at every picture once: can it be decoded, how large is it, is it there twice."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from unclip.data.bad_samples import BadSample
from unclip.data.decoding import decode_picture
from unclip.data.own.entries import Dropped, Entry
from unclip.data.parallel import run_jobs
from unclip.data.shards import PICTURE_BYTES

AT_ONCE = 64  # pictures of a job
MEMORY = "examined.jsonl"


class Examined(NamedTuple):
    """What was found in a picture's file; `problem` is None for a good one.

    Attributes:
        state: of the file when it was read: its size and when it was changed.
        width: in pixels, upright.
        height: in pixels, upright.
        digest: of the decoded pixels.
        problem: why it cannot be used, and the detail.
    """

    state: tuple[int, int]
    width: int = 0
    height: int = 0
    digest: str = ""
    problem: tuple[str, str] | None = None


class Good(NamedTuple):
    """A picture that becomes a sample, with its sides and a digest of its pixels."""

    entry: Entry
    width: int
    height: int
    digest: str


def examine(
    entries: Sequence[Entry],
    folder: Path,
    *,
    smallest: int,
    workers: int | None,
    progress: bool = True,
) -> tuple[list[Good], list[Dropped]]:
    """Sort pictures into good ones and others; of equal pictures the first is kept.

    What was found is kept in `folder`, so that what was cut off goes on where it stopped and only
    changed files are read again.

    Args:
        entries: pictures with captions.
        folder: takes examined.jsonl.
        smallest: pictures with a shorter side are dropped.
        workers: processes; None takes one a core, 0 stays in this one.
        progress: show a progress bar.
    """
    known = dict(_remembered(folder / MEMORY))
    states = {entry.source: _state(entry.path) for entry in entries}
    new = [e for e in entries if e.source not in known or known[e.source].state != states[e.source]]
    parts = [new[start : start + AT_ONCE] for start in range(0, len(new), AT_ONCE)]
    jobs = [(_look_at_all, ([entry.path for entry in part],)) for part in parts]
    with (
        tqdm(total=len(entries), desc="pictures", unit="picture", disable=not progress) as bar,
        open(folder / MEMORY, "a", encoding="utf-8") as memory,
    ):
        bar.update(len(entries) - len(new))
        for number, results in run_jobs(jobs, workers):
            for entry, examined in zip(parts[number], results, strict=True):
                known[entry.source] = examined
                memory.write(json.dumps([entry.source, *examined]) + "\n")
            memory.flush()
            bar.update(len(results))
    return _sort([(entry, known[entry.source]) for entry in entries], smallest)


def _sort(
    examined: Sequence[tuple[Entry, Examined]], smallest: int
) -> tuple[list[Good], list[Dropped]]:
    good, dropped, first = [], [], {}
    for entry, seen in examined:
        if seen.problem is not None:
            dropped.append(Dropped(entry.source, *seen.problem))
        elif min(seen.width, seen.height) < smallest:
            size = f"{seen.width} × {seen.height} pixels"
            dropped.append(Dropped(entry.source, "picture too small", size))
        elif seen.digest in first:
            dropped.append(Dropped(entry.source, "duplicate", f"of {first[seen.digest]}"))
        else:
            first[seen.digest] = entry.source
            good.append(Good(entry, seen.width, seen.height, seen.digest))
    return good, dropped


def _look_at_all(paths: Sequence[Path]) -> list[Examined]:
    return [look_at(path) for path in paths]


def look_at(path: Path) -> Examined:
    """Decode a picture; nothing that a file holds is an error here."""
    state = _state(path)
    if state[0] > PICTURE_BYTES:
        return Examined(state, problem=("oversize file", f"{state[0]} bytes"))
    try:
        content = path.read_bytes()
        picture = decode_picture(content, path.suffix[1:].lower(), minimum_size=1)
    except BadSample as bad:
        return Examined(state, problem=(bad.kind, bad.detail))
    except OSError as error:
        return Examined(state, problem=("unreadable file", error.strerror or str(error)))
    shape = b"%d %d " % picture.size
    digest = hashlib.blake2b(shape + picture.tobytes(), digest_size=16).hexdigest()
    return Examined(state, *picture.size, digest)


def _state(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return (0, 0)
    return (found.st_size, found.st_mtime_ns)


def _remembered(path: Path) -> Iterator[tuple[str, Examined]]:
    if not path.is_file():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                source, state, width, height, digest, problem = json.loads(line)
            except ValueError:  # a line that was being written when the run was cut off
                continue
            problem = problem and tuple(problem)
            yield source, Examined(tuple(state), width, height, digest, problem)
