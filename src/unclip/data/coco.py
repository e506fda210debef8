"""Fetches MS-COCO's validation set of 2014: resumable, checked, only what is evaluated on."""

import hashlib
import shutil
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

SOURCE = "http://images.cocodataset.org"
_CHUNK = 2**20
_TIMEOUT = 60.0
_RETRIES = 5


class Archive(NamedTuple):
    """A zip file, and what is wanted of it.

    Attributes:
        path: at the source.
        size: in bytes.
        md5: as the publisher's server and other readers of this file have it.
        wanted: the members that are unpacked, by the beginning of their names.
        files: how many these are.
        unpacked: their size in bytes, about.
    """

    path: str
    size: int
    md5: str
    wanted: tuple[str, ...]
    files: int
    unpacked: int

    @property
    def name(self) -> str:
        """The file's own name."""
        return PurePosixPath(self.path).name


ARCHIVES = (
    Archive(
        "annotations/annotations_trainval2014.zip",
        252_872_794,
        "0a379cfc70b0e71301e0f377548639bd",
        ("annotations/captions_val2014.json", "annotations/instances_val2014.json"),
        2,
        250_000_000,
    ),
    Archive(
        "zips/val2014.zip",
        6_645_013_297,
        "a3d79f5ed8d289b7a7554ce06a5782b3",
        ("val2014/COCO_val2014_",),
        40_504,
        6_650_000_000,
    ),
)


def fetch(
    root: str | Path,
    *,
    source: str = SOURCE,
    archives: Sequence[Archive] = ARCHIVES,
    pause: float = 2.0,
) -> str:
    """Brings ROOT/annotations and ROOT/val2014, and says what it did.

    It says first how much it fetches and where to. What was begun goes on where it stopped; an
    archive that is unpacked is removed.

    Args:
        root: the folder.
        source: where the archives lie, a mirror perhaps.
        archives: what is fetched.
        pause: seconds before a broken connection is tried again, twice as long each time.

    Raises:
        OSError: the disk is too small, or the source cannot be reached.
        ValueError: a file that was fetched is not the one that is known.
    """
    root = Path(root)
    missing = [archive for archive in archives if not _unpacked(root, archive)]
    if not missing:
        return f"{root} has all of MS-COCO's val2014 already"
    root.mkdir(parents=True, exist_ok=True)
    _say_first(root, missing)
    for archive in missing:
        file = _download(root, archive, f"{source.rstrip('/')}/{archive.path}", pause)
        _unpack(root, archive, file)
        file.unlink()
    return f"MS-COCO's val2014 lies in {root}"


def _say_first(root: Path, missing: Sequence[Archive]) -> None:
    """Size and place, before anything is fetched; too small a disk is an error now, not later."""
    begun = sum(_size(root / f"{archive.name}.part") for archive in missing)
    fetched = sum(archive.size for archive in missing)
    needed = max(archive.size for archive in missing) + sum(a.unpacked for a in missing) - begun
    free = shutil.disk_usage(root).free
    print(
        f"MS-COCO val2014: {_gigabytes(fetched)} to fetch ({_gigabytes(begun)} of it is there), "
        f"{_gigabytes(needed)} of disk needed, {_gigabytes(free)} free, into {root.resolve()}",
        flush=True,
    )
    if free < needed:
        raise OSError(f"{root.resolve()} has not the {_gigabytes(needed)} that are needed")


def _download(root: Path, archive: Archive, url: str, pause: float) -> Path:
    """The archive, whole and checked."""
    file, part = root / archive.name, root / f"{archive.name}.part"
    if _size(file) != archive.size:
        for attempt in range(_RETRIES):
            try:
                _continue(part, archive, url)
                break
            except OSError as error:
                if attempt == _RETRIES - 1 or isinstance(error, HTTPError):
                    raise OSError(f"{url} cannot be fetched ({error}): run it again") from error
                time.sleep(pause * 2**attempt)
        part.replace(file)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "md5").hexdigest()
    if digest != archive.md5:
        file.unlink()
        raise ValueError(
            f"{url} is not the file that is known (md5 {digest}, expected {archive.md5}); it was "
            "removed: run it again"
        )
    return file


def _continue(part: Path, archive: Archive, url: str) -> None:
    """Fetches what is missing of a file, from where it broke off."""
    begun = _size(part)
    if begun > archive.size:
        part.unlink()
        begun = 0
    if begun == archive.size:
        return
    request = Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
    with urlopen(request, timeout=_TIMEOUT) as answer:
        if begun and answer.status != 206:  # a server that knows no ranges sends all of it
            begun = 0
        with (
            part.open("ab" if begun else "wb") as file,
            tqdm(
                desc=archive.name,
                initial=begun,
                total=archive.size,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
            ) as bar,
        ):
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if _size(part) != archive.size:
        raise ConnectionError(f"it broke off after {_size(part):,} of {archive.size:,} bytes")


def _unpack(root: Path, archive: Archive, file: Path) -> None:
    """Unpacks the members that are wanted and not there yet, each beside its place first."""
    with zipfile.ZipFile(file) as opened:
        members = [m for m in opened.infolist() if _is_wanted(m.filename, archive)]
        if len(members) != archive.files:
            raise ValueError(f"{file} has {len(members)} of {archive.files} files: remove it")
        for member in tqdm(members, desc=f"unpacking {archive.name}", unit="file"):
            path = root / member.filename
            if _size(path) == member.file_size:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{path.name}.part")
            with opened.open(member) as content, unfinished.open("wb") as target:
                shutil.copyfileobj(content, target)
            unfinished.replace(path)


def _unpacked(root: Path, archive: Archive) -> bool:
    """Whether all that is wanted of an archive is there; one that still lies there is not done."""
    if (root / archive.name).exists():
        return False
    found = (
        path
        for folder in {PurePosixPath(w).parts[0] for w in archive.wanted}
        for path in (root / folder).glob("*")
    )
    names = (path.relative_to(root).as_posix() for path in found)
    return sum(_is_wanted(name, archive) for name in names) >= archive.files


def _is_wanted(name: str, archive: Archive) -> bool:
    """Whether a member is asked for; a name that leads elsewhere never is."""
    parts = PurePosixPath(name).parts
    return len(parts) == 2 and ".." not in parts and name.startswith(archive.wanted)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
