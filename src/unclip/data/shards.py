"""Read tar shards: how many samples there are, and their bytes.

webdataset groups a shard's members into samples. The members are found here, by their headers
alone, since webdataset's own tar iterator reads every member whatever its size and undoes any
compression; bytes are read later, and only of samples that are wanted.
"""

import contextlib
import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from braceexpand import braceexpand
from webdataset.tariterators import group_by_keys

from unclip.data.bad_samples import PREPARE, BadSample
from unclip.data.remote import fetch, is_known, is_url, list_remote, stated_counts

PICTURES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("json", "txt")
MEMBERS = frozenset(PICTURES + TEXTS)
PICTURE_BYTES = 64 * 2**20  # the largest picture member that is read
TEXT_BYTES = 2**20  # the largest json or txt member that is read
INDEX = "index.json"


class Shard(NamedTuple):
    """A tar file and the number of samples in it."""

    path: Path
    samples: int


def list_shards(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The tar files of a folder ROOT/SPLIT/SIZE (sorted), of one tar file, or of a list of them.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a URL, which has to go through `unclip.data.remote.list_remote`.
    """
    if is_url(source):
        raise ValueError(f"{source}: shards elsewhere are read by way of a cache: set data.cache")
    if not isinstance(source, (str, Path)):
        paths = [Path(path) for path in source]
        where = "the list of shards"
    else:
        where = Path(source)
        paths = [where] if where.suffix == ".tar" else sorted(where.glob("*.tar"))
    if not paths:
        raise FileNotFoundError(f"no shards (*.tar) in {where}: make them with `{PREPARE}`")
    for path in paths:
        if not is_known(path):
            raise missing_shard(path)
    return paths


def flat_shards(
    root: str, cache: str | Path | None = None, cache_gib: float | None = None
) -> list[Path]:
    """The shards of one folder, of a pattern /folder/{00000..00099}.tar, or of a URL of either.

    Raises:
        FileNotFoundError: there are none.
    """
    if is_url(root):
        return list_remote(root, cache, cache_gib)
    return list_shards(list(braceexpand(root)) if "{" in root else root)


def missing_shard(path: Path) -> FileNotFoundError:
    """The error for a shard that is not there."""
    return FileNotFoundError(
        f"shard {path.name} is missing in {path.parent}: make it with `{PREPARE}`"
    )


def open_shards(source: str | Path | Sequence[str | Path]) -> list[Shard]:
    """The shards of a source with their sample counts.

    Counts come from FOLDER/index.json (`{"00000.tar": 500, …}`) where that knows every shard and
    is no older than any. Else img2dataset's NAME_stats.json are believed, other shards are counted
    (headers only), and the index is written beside them, atomically, unless the folder is
    read-only.

    Raises:
        FileNotFoundError: no shards, or a shard named by the index is missing.
    """
    paths = list_shards(source)
    counts: dict[Path, int] = {}
    for folder in sorted({path.parent for path in paths}):
        wanted = [path for path in paths if path.parent == folder]
        index = _read_index(folder)
        if isinstance(source, (str, Path)) and Path(source) == folder:
            for name in index:
                if not is_known(folder / name):
                    raise FileNotFoundError(
                        f"shard {name} of {folder / INDEX} is missing: make it with `{PREPARE}`, "
                        f"or delete {INDEX} if the data set has become smaller"
                    )
        stale = [path for path in wanted if path.name not in index or _newer(path, folder / INDEX)]
        if stale:
            index |= {path.name: count for path, count in _counted(stale)}
            _write_index(folder, index)
        counts |= {path: index[path.name] for path in wanted}
    return [Shard(path, counts[path]) for path in paths]


def fingerprint(shards: Sequence[Shard]) -> str:
    """What tells these shards from others: names, counts, sizes, and bytes of up to 64 of them.

    Of shards elsewhere it is the address and the count. Where the folder lies does not matter.
    """
    digest = hashlib.sha256()
    looked_into = set(shards[:: max(len(shards) // 64, 1)])
    for shard in shards:
        digest.update(f"{shard.path.name} {shard.samples}\n".encode())
        if shard.path.with_suffix(".url").is_file():
            continue
        size = shard.path.stat().st_size
        digest.update(f"{size}\n".encode())
        if shard in looked_into:
            with open(shard.path, "rb") as file:
                digest.update(file.read(2**16))
                file.seek(max(size - 2**16, 0))
                digest.update(file.read())
    return digest.hexdigest()[:16]


def count_samples(path: Path) -> int:
    """Samples in a shard, by its headers; what is cut off or broken ends the count."""
    with open(path, "rb") as file:
        return sum(1 for _ in _headers(file, path, lambda key, bad: None))


def _counted(paths: Sequence[Path]) -> Iterator[tuple[Path, int]]:
    stated = dict(stated_counts(paths))
    for path in paths:
        if path not in stated:
            fetch(path)
        yield path, stated[path] if path in stated else _count(path, path.stat().st_mtime_ns)


@lru_cache
def _count(path: Path, changed: int) -> int:
    return count_samples(path)


def _read_index(folder: Path) -> dict[str, int]:
    try:
        index = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(index, dict):
        return {}
    return {name: n for name, n in index.items() if type(n) is int and n >= 0}


def _newer(path: Path, index: Path) -> bool:
    if not path.is_file():  # elsewhere
        return False
    return not index.is_file() or path.stat().st_mtime > index.stat().st_mtime


def _write_index(folder: Path, index: dict[str, int]) -> None:
    text = json.dumps(dict(sorted(index.items())), indent=1) + "\n"
    with contextlib.suppress(OSError):  # a read-only folder: counted each time
        write_atomically(folder / INDEX, text.encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it to the disk and rename it into its place."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class Member(NamedTuple):
    """Where a member's bytes stand in its shard."""

    offset: int
    size: int
    sparse: bool


class RawSample(NamedTuple):
    """A sample as it stands in its shard; `members` maps extensions to bytes (None: not read).

    `bad` says why there is nothing to decode, or is None.
    """

    shard: Path
    key: str
    members: dict[str, bytes | None]
    bad: BadSample | None = None


Report = Callable[[str, BadSample], None]


def read_shard(
    shard: Shard,
    places: range,
    *,
    wanted: Callable[[int], bool] = lambda place: True,
    pictures: bool = True,
    report: Callable[[Path, str, BadSample], None] | None = None,
) -> Iterator[tuple[int, RawSample]]:
    """Yield (place, sample) for the wanted ones of the places `places` (step 1) of a shard.

    Always yields every wanted place: what a cut-off shard no longer holds comes as bad.

    Args:
        shard: the shard; its count is what the index says.
        places: a range of places within the shard.
        wanted: which of them to read; the bytes of the others are skipped.
        pictures: False leaves the pictures' bytes unread.
        report: is told of what is wrong without costing a sample (doubled members).

    Raises:
        FileNotFoundError: the shard is gone.
        ValueError: the shard holds more samples than the index says.
    """
    next_place = places.start
    damage = None

    def note(key: str, bad: BadSample) -> None:
        nonlocal damage
        if bad.kind == "truncated shard":
            damage = bad
        elif report is not None:
            report(shard.path, key, bad)

    fetch(shard.path)
    try:
        file = open(shard.path, "rb", buffering=2**18)  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        raise missing_shard(shard.path) from None
    with file:
        seen: set[str] = set()
        for place, (key, members) in enumerate(_headers(file, shard.path, note)):
            if place >= shard.samples:
                raise ValueError(
                    f"{shard.path} holds more than the {shard.samples} samples that "
                    f"{shard.path.parent / INDEX} gives it: delete that file (and the shard's "
                    "_stats.json, if it has one), it is made anew"
                )
            doubled = key in seen
            seen.add(key)
            if place in places:
                next_place = place + 1
                if wanted(place):
                    if doubled:
                        yield place, RawSample(shard.path, key, {}, BadSample("duplicate key"))
                    else:
                        yield place, _read_members(file, shard.path, key, members, pictures)
            if place == places.stop - 1 and places.stop < shard.samples:
                return
    if damage is not None and next_place == places.stop and report is not None:
        report(shard.path, "", damage)  # the samples of the index are there, but more was
    damage = damage or BadSample("truncated shard", "it holds fewer samples than its index says")
    for place in range(next_place, places.stop):
        if wanted(place):
            yield place, RawSample(shard.path, f"#{place}", {}, damage)


def read_positions(
    order: Sequence[Shard],
    positions: range,
    *,
    wanted: Callable[[int], bool] = lambda position: True,
    pictures: bool = True,
    report: Callable[[Path, str, BadSample], None] | None = None,
) -> Iterator[tuple[int, RawSample]]:
    """Yield (position, sample) for the wanted ones of `positions` (step 1) of an epoch's line.

    Positions past the end start again at the line's beginning.
    """
    total = sum(shard.samples for shard in order)
    position = positions.start
    while position < positions.stop:
        place = position % total
        for shard in order:
            if place < shard.samples:
                break
            place -= shard.samples
        stop = min(shard.samples, place + positions.stop - position)
        base = position - place
        if any(wanted(base + i) for i in range(place, stop)):
            for i, sample in read_shard(
                shard,
                range(place, stop),
                wanted=lambda i, base=base: wanted(base + i),
                pictures=pictures,
                report=report,
            ):
                yield base + i, sample
        position = base + stop


def _headers(file: BinaryIO, path: Path, report: Report) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield (key, members by extension) of a tar's samples without reading their bytes."""

    def doubled(error: Exception) -> bool:  # webdataset keeps the first of two equal members
        report(str(error.args[0]), BadSample("duplicate key"))
        return True

    for sample in group_by_keys(_members(file, path, report), handler=doubled):
        yield sample["__key__"], {name: at for name, at in sample.items() if name in MEMBERS}


def _members(file: BinaryIO, path: Path, report: Report) -> Iterator[dict]:
    """Yield the members that are ours to decode, as webdataset's grouping wants them."""
    url = str(path)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            offset = -1
            while (member := archive.next()) is not None:
                archive.members = []  # tarfile would keep them all
                if archive.offset <= offset:  # a forged size; some Pythons would go round for ever
                    raise tarfile.ReadError("members overlap")
                offset = archive.offset
                extension = member.name.rpartition(".")[2].lower()
                if extension in MEMBERS and member.isreg():
                    data = Member(member.offset_data, member.size, member.sparse is not None)
                    yield {"fname": member.name, "data": data, "__url__": url}
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                report("", BadSample("truncated shard", "no end-of-archive mark"))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        report("", BadSample("truncated shard", str(error)))


def _read_members(
    file: BinaryIO,
    path: Path,
    key: str,
    members: dict[str, Member],
    pictures: bool,
) -> RawSample:
    read: dict[str, bytes | None] = {}
    for name, member in members.items():
        if name in PICTURES and not pictures:
            read[name] = None
            continue
        limit = PICTURE_BYTES if name in PICTURES else TEXT_BYTES
        if member.sparse or not 0 <= member.size <= limit:
            detail = f"{name} of {member.size} bytes, at most {limit} are read"
            return RawSample(path, key, {}, BadSample("oversize member", detail))
        file.seek(member.offset)
        read[name] = file.read(member.size)
        if len(read[name]) < member.size:
            return RawSample(path, key, {}, BadSample("truncated shard", f"{name} is cut off"))
    return RawSample(path, key, read)
