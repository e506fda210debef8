"""Read tar shards: count their samples and read the members of the requested ones.

webdataset groups the members of a shard into samples. The members are found here, from the tar
headers alone, because webdataset's own tar iterator reads every member whatever its size and
decompresses archives. Bytes are read later, and only for the requested samples.
"""

import contextlib
import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from braceexpand import braceexpand
from webdataset.tariterators import group_by_keys

from unclip.data.bad_samples import PREPARE, BadSample
from unclip.data.remote import fetch, is_available, is_url, read_stats
from unclip.files import write_text

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, "json", "txt"))  # of the members that are read
MAX_IMAGE_BYTES = 64 * 2**20  # size limit of an image member
MAX_TEXT_BYTES = 2**20  # size limit of a json or txt member
INDEX = "index.json"


class Shard(NamedTuple):
    """A tar file and the number of samples in it."""

    path: Path
    samples: int


def list_shards(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """List the tar files of a folder (sorted), a pattern, a single tar file or a list.

    A pattern is a string such as /folder/{00000..00099}.tar.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: the source is a URL; use `unclip.data.remote.list_remote`.
    """
    if is_url(source):
        raise ValueError(f"{source}: shards at a URL need a cache folder: set data.cache")
    if not isinstance(source, (str, Path)):
        paths = [Path(path) for path in source]
        where = "the list of shards"
    elif "{" in str(source):
        paths = [Path(path) for path in braceexpand(str(source))]
    else:
        where = Path(source)
        paths = [where] if where.suffix == ".tar" else sorted(where.glob("*.tar"))
    if not paths:
        raise FileNotFoundError(f"no shards (*.tar) in {where}: make them with `{PREPARE}`")
    for path in paths:
        if not is_available(path):
            raise _missing_shard(path)
    return paths


def open_shards(source: str | Path | Sequence[str | Path]) -> list[Shard]:
    """Return the shards of a source with their sample counts.

    Counts are taken from FOLDER/index.json (`{"00000.tar": 500, …}`) if it lists every shard and
    is newer than all of them. Otherwise they are taken from img2dataset's NAME_stats.json or
    counted from the tar headers, and the index is written unless the folder is read-only.

    Raises:
        FileNotFoundError: there are no shards, or a shard in the index is missing.
    """
    paths = list_shards(source)
    counts: dict[Path, int] = {}
    for folder in sorted({path.parent for path in paths}):
        requested = [path for path in paths if path.parent == folder]
        index = _read_index(folder)
        if isinstance(source, (str, Path)) and Path(source) == folder:
            for name in index:
                if not is_available(folder / name):
                    raise FileNotFoundError(
                        f"shard {name} of {folder / INDEX} is missing: make it with `{PREPARE}`, "
                        f"or delete {INDEX} if the data set has fewer shards now"
                    )
        stale = [p for p in requested if p.name not in index or _is_newer(p, folder / INDEX)]
        if stale:
            index |= {path.name: count for path, count in _count_all(stale)}
            with contextlib.suppress(OSError):  # in a read-only folder they are counted each time
                text = json.dumps(dict(sorted(index.items())), indent=1) + "\n"
                write_text(folder / INDEX, text)
        counts |= {path: index[path.name] for path in requested}
    return [Shard(path, counts[path]) for path in paths]


def shards_fingerprint(shards: Sequence[Shard]) -> str:
    """Hash the names, counts and sizes of shards, and both ends of up to 64 of them.

    Only the address and the count of a remote shard are hashed. The folder does not matter.
    """
    digest = hashlib.sha256()
    sampled = set(shards[:: max(len(shards) // 64, 1)])
    for shard in shards:
        digest.update(f"{shard.path.name} {shard.samples}\n".encode())
        if shard.path.with_suffix(".url").is_file():
            continue
        digest.update(f"{shard.path.stat().st_size}\n".encode())
        if shard in sampled:
            digest.update(read_ends(shard.path))
    return digest.hexdigest()[:16]


def read_ends(path: Path, size: int = 2**16) -> bytes:
    """Read the first and the last `size` bytes of a file, to hash it quickly."""
    with open(path, "rb") as file:
        head = file.read(size)
        file.seek(max(path.stat().st_size - size, 0))
        return head + file.read()


def count_samples(path: Path) -> int:
    """Count the samples of a shard from its headers, up to the first broken one."""
    with open(path, "rb") as file:
        return sum(1 for _ in _headers(file, path, _ignore))


def _count_all(paths: Sequence[Path]) -> Iterator[tuple[Path, int]]:
    stats = dict(read_stats(paths))
    for path in paths:
        if path not in stats:
            fetch(path)
        yield path, stats[path] if path in stats else _count(path, path.stat().st_mtime_ns)


@lru_cache
def _count(path: Path, modified: int) -> int:
    return count_samples(path)


def _read_index(folder: Path) -> dict[str, int]:
    try:
        index = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(index, dict):
        return {}
    return {name: n for name, n in index.items() if type(n) is int and n >= 0}


def _is_newer(path: Path, index: Path) -> bool:
    if not path.is_file():  # a remote shard
        return False
    return not index.is_file() or path.stat().st_mtime > index.stat().st_mtime


def _missing_shard(path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"shard {path.name} is missing in {path.parent}: make it with `{PREPARE}`"
    )


class Member(NamedTuple):
    """The location of a member's bytes in its shard."""

    offset: int
    size: int
    sparse: bool


class RawSample(NamedTuple):
    """The undecoded members of a sample.

    Attributes:
        shard: the tar file.
        key: the sample's name in the shard.
        members: encoded bytes by file extension; None if they were not read.
        bad: why the sample cannot be decoded, or None.
    """

    shard: Path
    key: str
    members: dict[str, bytes | None]
    bad: BadSample | None = None


Report = Callable[[Path, str, BadSample], None]  # (shard, key, defect)


def _ignore(shard: Path, key: str, bad: BadSample) -> None:
    """Ignore a defect."""


def read_shard(
    shard: Shard,
    places: range,
    *,
    wanted: Callable[[int], bool] = lambda place: True,
    images: bool = True,
    report: Report = _ignore,
) -> Iterator[tuple[int, RawSample]]:
    """Yield (place, sample) for the wanted ones of the consecutive `places` of a shard.

    Every wanted place is yielded, also if the shard is truncated: its missing samples are bad.

    Args:
        shard: the shard, with the sample count from the index.
        places: indices of samples in the shard.
        wanted: whether to read the sample at a place; the bytes of the others are skipped.
        images: whether to read the bytes of images.
        report: called for defects that cost no sample (duplicate members).

    Raises:
        FileNotFoundError: the shard does not exist any more.
        ValueError: the shard holds more samples than its index says.
    """
    next_place = places.start
    damage: list[BadSample] = []

    def note(path: Path, key: str, bad: BadSample) -> None:
        if bad.kind == "truncated shard":
            damage.append(bad)
        else:
            report(path, key, bad)

    seen: set[str] = set()
    with _open(shard.path) as file:
        for place, (key, members) in enumerate(_headers(file, shard.path, note)):
            if place >= shard.samples:
                raise ValueError(
                    f"{shard.path} holds more samples than the {shard.samples} listed in "
                    f"{shard.path.parent / INDEX}: delete that file (and the shard's _stats.json "
                    "if it has one); it will be written again"
                )
            if place in places:
                next_place = place + 1
                if wanted(place) and key in seen:
                    yield place, RawSample(shard.path, key, {}, BadSample("duplicate key"))
                elif wanted(place):
                    yield place, _read_members(file, shard.path, key, members, images)
            if place == places.stop - 1 and places.stop < shard.samples:
                return
            seen.add(key)
    if damage and next_place == places.stop:  # every sample is there, but the end is damaged
        report(shard.path, "", damage[-1])
    damage.insert(0, BadSample("truncated shard", "it has fewer samples than its index says"))
    for place in filter(wanted, range(next_place, places.stop)):
        yield place, RawSample(shard.path, f"#{place}", {}, damage[-1])


def _open(path: Path) -> BinaryIO:
    fetch(path)
    try:
        return open(path, "rb", buffering=2**18)
    except FileNotFoundError:
        raise _missing_shard(path) from None


def read_positions(
    order: Sequence[Shard],
    positions: range,
    *,
    wanted: Callable[[int], bool] = lambda position: True,
    images: bool = True,
    report: Report = _ignore,
) -> Iterator[tuple[int, RawSample]]:
    """Yield (position, sample) for the wanted ones of the consecutive `positions` of an epoch.

    Positions beyond the last shard continue with the first one.
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
                images=images,
                report=report,
            ):
                yield base + i, sample
        position = base + stop


def _headers(file: BinaryIO, path: Path, report: Report) -> Iterator[tuple[str, dict[str, Member]]]:
    """Yield the key and the members by extension of a tar's samples, without their bytes."""

    def keep_first(error: Exception) -> bool:  # webdataset keeps the first of two equal members
        report(path, str(error.args[0]), BadSample("duplicate key"))
        return True

    for sample in group_by_keys(_members(file, path, report), handler=keep_first):
        yield sample["__key__"], {name: at for name, at in sample.items() if name in EXTENSIONS}


def _members(file: BinaryIO, path: Path, report: Report) -> Iterator[dict]:
    """Yield the members with a known extension, in the form that webdataset groups."""
    url = str(path)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            offset = -1
            while (member := archive.next()) is not None:
                archive.members = []  # tarfile would keep them all in memory
                if archive.offset <= offset:  # a forged size: some Python versions loop forever
                    raise tarfile.ReadError("members overlap")
                offset = archive.offset
                extension = member.name.rpartition(".")[2].lower()
                if extension in EXTENSIONS and member.isreg():
                    data = Member(member.offset_data, member.size, member.sparse is not None)
                    yield {"fname": member.name, "data": data, "__url__": url}
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                report(path, "", BadSample("truncated shard", "no end-of-archive mark"))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        report(path, "", BadSample("truncated shard", str(error)))


def _read_members(
    file: BinaryIO, path: Path, key: str, members: dict[str, Member], images: bool
) -> RawSample:
    read: dict[str, bytes | None] = {}
    for name, member in members.items():
        if name in IMAGE_EXTENSIONS and not images:
            read[name] = None
            continue
        limit = MAX_IMAGE_BYTES if name in IMAGE_EXTENSIONS else MAX_TEXT_BYTES
        if member.sparse or not 0 <= member.size <= limit:
            detail = f"{name} has {member.size} bytes, the limit is {limit}"
            return RawSample(path, key, {}, BadSample("oversize member", detail))
        file.seek(member.offset)
        read[name] = file.read(member.size)
        if len(read[name]) < member.size:
            return RawSample(path, key, {}, BadSample("truncated shard", f"{name} is incomplete"))
    return RawSample(path, key, read)
