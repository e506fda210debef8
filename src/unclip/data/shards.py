"""Read tar shards: count their samples and read the members of the requested ones."""

import bisect
import contextlib
import hashlib
import itertools
import json
import logging
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from braceexpand import braceexpand

from unclip.data.bad_samples import BadSample, prepare_command
from unclip.data.remote import fetch, is_url, prefetch, read_stats
from unclip.data.tar_headers import IMAGE_EXTENSIONS, check_is_tar, describe_damage, read_headers
from unclip.files import read_json, write_text

MAX_IMAGE_BYTES = 64 * 2**20  # size limit of an image member
MAX_TEXT_BYTES = 2**20  # size limit of a json or txt member
INDEX = "index.json"
logger = logging.getLogger(__name__)

Source = str | Path | Sequence[str | Path]


class Count(NamedTuple):
    """The result of counting the samples of a shard."""

    samples: int  # those with at least one readable member
    damage: str = ""  # a description with the number of lost samples


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
    elif "{" in str(source) and not Path(source).exists():
        paths = [Path(path) for path in braceexpand(str(source))]
    else:
        folder = Path(source)
        paths = [folder] if folder.suffix == ".tar" else sorted(folder.glob("*.tar"))
    if not paths:
        command = prepare_command(Path(str(source)) / "*.tar")
        raise FileNotFoundError(f"no shards (*.tar) in {source}: make them with {command}")
    _check_available(paths)
    return paths


def open_shards(source: Source) -> list[Shard]:
    """Return the shards of a source with their sample counts.

    Counts are taken from FOLDER/index.json (`{"00000.tar": 500, …}`) if it lists every shard and
    is newer than all of them. Otherwise they are taken from img2dataset's NAME_stats.json or
    counted from the tar headers, and the index is written unless the folder is read-only. The
    count of a damaged shard is not stored.

    Raises:
        FileNotFoundError: there are no shards, or a shard in the index is missing.
        ValueError: a shard is not a tar file.
    """
    paths = list_shards(source)
    counts: dict[Path, int] = {}
    for folder in sorted({path.parent for path in paths}):
        index = _read_index(folder)
        if isinstance(source, (str, Path)) and Path(source) == folder:
            _check_available([folder / name for name in index])
        requested = [path for path in paths if path.parent == folder]
        written = (folder / INDEX).stat().st_mtime if index else 0.0
        stale = [
            path
            for path in requested
            if path.name not in index or (path.is_file() and path.stat().st_mtime > written)
        ]
        if stale:
            stats = dict(read_stats(stale))
            for path in filter(Path.is_file, stats):
                with open(path, "rb") as file:
                    check_is_tar(file)
            counted = {p: Count(stats[p]) if p in stats else count_samples(p) for p in stale}
            index |= {path.name: count.samples for path, count in counted.items()}
            damaged = {path.name for path, count in counted.items() if count.damage}
            lasting = {name: index[name] for name in sorted(index.keys() - damaged)}
            with contextlib.suppress(OSError):  # in a read-only folder they are counted each time
                write_text(folder / INDEX, json.dumps(lasting, indent=1) + "\n")
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


def count_samples(path: Path) -> Count:
    """Count the samples of a shard from its headers; log a warning if the shard is damaged.

    Raises:
        ValueError: the file is not a tar file.
    """
    fetch(path)
    return _count_version(path, path.stat().st_mtime_ns)


@cache
def _count_version(path: Path, modified: int) -> Count:
    gaps: list[range] = []
    with open(path, "rb") as file:
        samples = sum(1 for _ in read_headers(file, gaps))
    damage = describe_damage(gaps, samples, path.stat().st_size)
    if damage:
        logger.warning("%s is damaged: %s", path, damage)
    elif not samples:
        logger.warning("%s holds no images and captions that can be read", path)
    return Count(samples, damage)


def _read_index(folder: Path) -> dict[str, int]:
    try:
        index = dict(read_json(folder / INDEX))
    except (OSError, TypeError, ValueError):
        return {}
    return {name: n for name, n in index.items() if type(n) is int and n >= 0}


def _check_available(paths: Sequence[Path]) -> None:
    for path in paths:
        if not path.is_file() and not path.with_suffix(".url").is_file():
            raise FileNotFoundError(
                f"shard {path.name} is missing in {path.parent}: make it with "
                f"{prepare_command(path)}, or delete {INDEX} if the data set has fewer shards now"
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

    Every wanted position is yielded, also if a shard is damaged: its missing samples are bad.

    Args:
        order: the shards, with the sample counts from the index.
        positions: positions in this order; those beyond the last shard continue with the first.
        wanted: whether to read the sample at a position; the bytes of the others are skipped.
        images: whether to read the bytes of images.
        report: called for defects that cost no sample (duplicate members).

    Raises:
        FileNotFoundError: a shard does not exist any more.
        ValueError: a shard is not a tar file, or holds more samples than its index says.
    """
    parts = (part for part in _parts(order, positions) if any(map(wanted, part[2])))
    for part, following in itertools.pairwise(itertools.chain(parts, [None])):
        if following is not None:
            prefetch(following[0].path)
        assert part is not None  # only the last `following` is
        yield from _read_shard(*part, wanted, images, report)


def _parts(order: Sequence[Shard], positions: range) -> Iterator[tuple[Shard, int, range]]:
    """Split positions by shards: yield a shard, the position of its first sample, and the part."""
    ends = list(itertools.accumulate(shard.samples for shard in order))
    position = positions.start
    while position < positions.stop:
        place = position % ends[-1]
        index = bisect.bisect_right(ends, place)
        shard = order[index]
        first = position - place + ends[index] - shard.samples
        part = range(position, min(first + shard.samples, positions.stop))
        yield shard, first, part
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
    gaps: list[range] = []
    seen: set[str] = set()
    _check_available([shard.path])
    fetch(shard.path)
    with open(shard.path, "rb", buffering=2**18) as file:
        for position, (key, members, repeated) in enumerate(read_headers(file, gaps), start=first):
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
    damage = BadSample(
        "damaged shard", describe_damage(gaps, end - first, shard.path.stat().st_size)
    )
    if gaps and end == positions.stop:  # every sample is there
        report(shard.path, "", damage)
    for position in filter(wanted, range(end, positions.stop)):
        detail = damage.detail or "it has fewer samples than its index says"
        bad = BadSample("damaged shard", detail)
        yield position, RawSample(shard.path, f"#{position - first}", {}, bad)


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
            return RawSample(path, key, {}, BadSample("damaged shard", f"{name} is incomplete"))
        read[name] = content
    return RawSample(path, key, read)
