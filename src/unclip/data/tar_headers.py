"""Find the members of the samples in a tar file, also in a damaged one.

They are found from the tar headers alone, because webdataset's tar iterator reads every member
whatever its size and decompresses archives. Members belong to the same sample if webdataset says
so.
"""

import io
import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from webdataset.tariterators import base_plus_ext

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff")
EXTENSIONS = frozenset((*IMAGE_EXTENSIONS, "json", "txt"))  # of the members that are read
MAX_FAILURES = 100  # headers that make tarfile fail; each may cost a pass over the file
NOT_TAR = {  # the first bytes of files that are often found in place of a shard, and the fix
    rb"\Z": "an empty file: write or download it again",
    rb"\x1f\x8b": "a gzip file: unpack it with gunzip",
    rb"BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|PK\x03\x04": "another archive: unpack it",
    rb"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
    rb"\s*<": "a web page: download the shard again",
    rb"\0": "zeros: download or copy the shard again",
}


def read_headers(
    file: BinaryIO, gaps: list[range]
) -> Iterator[tuple[str, dict[str, tarfile.TarInfo], str]]:
    """Yield the key, the members by extension, and the name of a repeated member of each sample.

    The first of several equal members counts. The bytes of unreadable parts are added to `gaps`.
    """
    for key, group in itertools.groupby(_members(file, gaps), key=lambda member: member[0]):
        members: dict[str, tarfile.TarInfo] = {}
        repeated = ""
        for _, extension, member in group:
            if extension in members:
                repeated = f"{key}.{extension}"
            elif extension in EXTENSIONS:
                members[extension] = member
        yield key, members, repeated


def _members(file: BinaryIO, gaps: list[range]) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield (key, extensions, header) of the members with a known last extension.

    After a damaged header, reading continues with the next intact one.

    Raises:
        ValueError: the file is not a tar file.
    """
    size = check_is_tar(file)
    # `tarfile.open(fileobj=file)` would fail at once if the second header is damaged.
    empty = io.BytesIO(bytes(2 * tarfile.BLOCKSIZE))
    archive = tarfile.open(fileobj=empty, mode="r:", encoding="utf-8", ignore_zeros=True)  # noqa: SIM115
    archive.fileobj, archive.offset = file, 0  # pyright: ignore[reportAttributeAccessIssue]
    end = failures = file.seek(0)
    while archive.offset < size and failures < MAX_FAILURES:
        try:
            member = archive.next()
        except Exception:  # tarfile raises almost anything on damaged headers
            archive.offset += tarfile.BLOCKSIZE
            failures += 1
            continue
        if member is None:
            break
        # tarfile would keep all members in memory
        archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
        if archive.offset < member.offset_data:  # a forged negative size
            archive.offset = member.offset_data
            continue
        if member.offset > end:
            gaps.append(range(end, member.offset))
        end = archive.offset
        name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        key, extensions = base_plus_ext(name)
        extensions = (extensions or "").lower()
        if key and member.isreg() and extensions.rpartition(".")[2] in EXTENSIONS:
            yield key, extensions, member
    file.seek(end)
    is_marked = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    if not is_marked or size - end > 2 * tarfile.RECORDSIZE:  # cut off, or filled with zeros
        gaps.append(range(end, size))


def check_is_tar(file: BinaryIO) -> int:
    """Check the first header of a file, without which it is not a tar file; return its size.

    Raises:
        ValueError: the file is not a tar file; the message says what it looks like.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(tarfile.BLOCKSIZE)
    if not any(head) and size in (2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE):
        return size  # an archive without members
    try:
        tarfile.TarInfo.frombuf(head, tarfile.ENCODING, "surrogateescape")
    except tarfile.TarError:
        looks = [text for start, text in NOT_TAR.items() if re.match(start, head)]
        unknown = f"unknown data of {size} bytes: write or download it again"
        raise ValueError(f"{file.name} is not a tar file but {[*looks, unknown][0]}") from None
    return size


def describe_damage(gaps: Sequence[range], samples: int, size: int) -> str:
    """Describe the unreadable parts of a shard, and estimate how many samples they held."""
    if not gaps:
        return ""
    if len(gaps) == 1 and gaps[0].start == size:
        return "it has no end-of-archive mark, so samples at its end may be missing"
    unreadable = sum(map(len, gaps))
    mean = max(size - unreadable, tarfile.BLOCKSIZE) / max(samples, 1)
    lost = max(round(unreadable / mean), 1)
    return (
        f"it cannot be read from byte {gaps[0].start} to {gaps[-1].stop} ({len(gaps)} places); "
        f"about {lost} of {samples + lost} samples are lost or incomplete: write or download it "
        "again"
    )
