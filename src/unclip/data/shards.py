"""Read tar shards: count their samples and read the members of the requested ones.

The members are found from the tar headers alone, because webdataset's tar iterator reads every
member whatever its size and decompresses archives. Bytes are read later, and only for the
requested samples. Members belong to the same sample if webdataset says so.
"""

import contextlib
import hashlib
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from braceexpand import braceexpand
from webdataset.tariterators import base_plus_ext

from unclip.data.bad_samples import PREPARE, BadSample
from unclip.data.remote import fetch, is_available, is_url, read_stats
from unclip.files import write_text

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, "json", "txt"))  # of the members that are read
MAX_IMAGE_BYTES = 64 * 2**20  # size limit of an image member
MAX_TEXT_BYTES = 2**20  # size limit of a json or txt member
INDEX = "index.json"

Source = str | Path | Sequence[str | Path]


class Shard(NamedTuple):
    """A tar file and the number of samples in it."""

    path: Path
    samples: int


def list_shards(source: Source) -> list[Path]:
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
    elif "{" in str(source):
        paths = [Path(path) for path in braceexpand(str(source))]
    else:
        folder = Path(source)
        paths = [folder] if folder.suffix == ".tar" else sorted(folder.glob("*.tar"))
    if not paths:
        raise FileNotFoundError(f"no shards (*.tar) in {source}: make them with `{PREPARE}`")
    _check_available(paths)
    return paths


def open_shards(source: Source) -> list[Shard]:
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
        index = _read_index(folder)
        if isinstance(source, (str, Path)) and Path(source) == folder:
            _check_available([folder / name for name in index])
        requested = [path for path in paths if path.parent == folder]
        stale = [p for p in requested if p.name not in index or _is_newer(p, folder / INDEX)]
        if stale:
            stats = dict(read_stats(stale))
            index |= {p.name: stats[p] if p in stats else count_samples(p) for p in stale}
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
    fetch(path)
    return _count(path, path.stat().st_mtime_ns)


@lru_cache
def _count(path: Path, modified: int) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in _headers(file, []))


def _read_index(folder: Path) -> dict[str, int]:
    try:
        index = dict(json.loads((folder / INDEX).read_text()))
    except (OSError, TypeError, ValueError):
        return {}
    return {name: n for name, n in index.items() if type(n) is int and n >= 0}


def _is_newer(path: Path, index: Path) -> bool:
    if not path.is_file():  # a remote shard
        return False
    return not index.is_file() or path.stat().st_mtime > index.stat().st_mtime


def _check_available(paths: Sequence[Path]) -> None:
    for path in paths:
        if not is_available(path):
            raise FileNotFoundError(
                f"shard {path.name} is missing in {path.parent}: make it with `{PREPARE}`, or "
                f"delete {INDEX} if the data set has fewer shards now"
            )


class RawSample(NamedTuple):
    """The undecoded members of a sample."""

    shard: Path
    key: str  # the sample's name in the shard
    members: dict[str, bytes | None]  # encoded bytes by file extension; None if they were not read
    bad: BadSample | None = None  # why the sample cannot be decoded


Report = Callable[[Path, str, BadSample], None]  # (shard, key, defect)


def read_positions(
    order: Sequence[Shard],
    positions: range,
    *,
    wanted: Callable[[int], bool] = lambda position: True,
    images: bool = True,
    report: Report = lambda shard, key, bad: None,
) -> Iterator[tuple[int, RawSample]]:
    """Yield (position, sample) for the wanted ones of the consecutive `positions` of an epoch.

    Every wanted position is yielded, also if a shard is truncated: its missing samples are bad.

    Args:
        order: the shards, with the sample counts from the index.
        positions: positions in this order; those beyond the last shard continue with the first.
        wanted: whether to read the sample at a position; the bytes of the others are skipped.
        images: whether to read the bytes of images.
        report: called for defects that cost no sample (duplicate members).

    Raises:
        FileNotFoundError: a shard does not exist any more.
        ValueError: a shard holds more samples than its index says.
    """
    total = sum(shard.samples for shard in order)
    position = positions.start
    while position < positions.stop:
        place = position % total
        for shard in order:
            if place < shard.samples:
                break
            place -= shard.samples
        first = position - place
        part = range(position, min(first + shard.samples, positions.stop))
        if any(map(wanted, part)):
            yield from _read_shard(shard, first, part, wanted, images, report)
        position = part.stop


def _read_shard(
    shard: Shard,
    first: int,
    positions: range,
    wanted: Callable[[int], bool],
    images: bool,
    report: Report,
) -> Iterator[tuple[int, RawSample]]:
    """Read one shard as `read_positions` does; `first` is the position of its first sample."""
    end = positions.start
    damage: list[BadSample] = []
    seen: set[str] = set()
    _check_available([shard.path])
    fetch(shard.path)
    with open(shard.path, "rb", buffering=2**18) as file:
        for position, (key, members, repeated) in enumerate(_headers(file, damage), start=first):
            if position >= first + shard.samples:
                raise ValueError(
                    f"{shard.path} holds more samples than the {shard.samples} listed in "
                    f"{shard.path.parent / INDEX}: delete that file (and the shard's _stats.json "
                    "if it has one); it will be written again"
                )
            if position in positions:
                end = position + 1
                if repeated:
                    report(shard.path, key, BadSample("duplicate key", repeated))
                if wanted(position) and key in seen:
                    yield position, RawSample(shard.path, key, {}, BadSample("duplicate key"))
                elif wanted(position):
                    yield position, _read_members(file, shard.path, key, members, images)
            if end == positions.stop < first + shard.samples:
                return
            seen.add(key)
    if damage and end == positions.stop:  # every sample is there, but the end is damaged
        report(shard.path, "", damage[-1])
    damage.insert(0, BadSample("truncated shard", "it has fewer samples than its index says"))
    for position in filter(wanted, range(end, positions.stop)):
        yield position, RawSample(shard.path, f"#{position - first}", {}, damage[-1])


def _headers(
    file: BinaryIO, damage: list[BadSample]
) -> Iterator[tuple[str, dict[str, tarfile.TarInfo], str]]:
    """Yield the key, the members by extension, and the name of a repeated member of each sample.

    The first of several equal members counts. A damaged end of the shard is appended to `damage`.
    """
    for key, group in itertools.groupby(_members(file, damage), key=lambda member: member[0]):
        members: dict[str, tarfile.TarInfo] = {}
        repeated = ""
        for _, extension, member in group:
            if extension in members:
                repeated = f"{key}.{extension}"
            elif extension in EXTENSIONS:
                members[extension] = member
        yield key, members, repeated


def _members(file: BinaryIO, damage: list[BadSample]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield (key, extensions, header) of the members with a known last extension."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            offset = -1
            while (member := archive.next()) is not None:
                # tarfile would keep all members in memory
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
                if archive.offset <= offset:  # a forged size: some Python versions loop forever
                    raise tarfile.ReadError("members overlap")
                offset = archive.offset
                key, extensions = base_plus_ext(member.name)
                extensions = (extensions or "").lower()
                if key and member.isreg() and extensions.rpartition(".")[2] in EXTENSIONS:
                    yield key, extensions, member
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                damage.append(BadSample("truncated shard", "no end-of-archive mark"))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        damage.append(BadSample("truncated shard", str(error)))


def _read_members(
    file: BinaryIO, path: Path, key: str, members: dict[str, tarfile.TarInfo], images: bool
) -> RawSample:
    read: dict[str, bytes | None] = {}
    for name, member in members.items():
        is_image = name in IMAGE_EXTENSIONS
        if is_image and not images:
            read[name] = None
            continue
        limit = MAX_IMAGE_BYTES if is_image else MAX_TEXT_BYTES
        if member.sparse is not None or not 0 <= member.size <= limit:
            detail = f"{name} has {member.size} bytes, the limit is {limit}"
            return RawSample(path, key, {}, BadSample("oversize member", detail))
        file.seek(member.offset_data)
        content = file.read(member.size)
        if len(content) < member.size:
            return RawSample(path, key, {}, BadSample("truncated shard", f"{name} is incomplete"))
        read[name] = content
    return RawSample(path, key, read)
