"""Download MS-COCO val2014: resumable, verified by MD5, and only the files that are evaluated."""

import hashlib
import shutil
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

from tqdm import tqdm

from unclip.files import atomic_write

SOURCE = "http://images.cocodataset.org"


class Archive(NamedTuple):
    """A zip file at the source; `members` of its files match `pattern` and are unpacked."""

    path: str
    size: int  # bytes; the unpacked members are about as large
    md5: str
    pattern: str  # FOLDER/PATTERN
    members: int

    def part(self, root: Path) -> Path:
        """Return the path of the download, which is deleted after it is unpacked."""
        return root / f"{Path(self.path).name}.part"


ARCHIVES = (
    Archive(
        "annotations/annotations_trainval2014.zip",
        252_872_794,
        "0a379cfc70b0e71301e0f377548639bd",
        "annotations/[ci]*_val2014.json",  # captions and instances
        2,
    ),
    Archive(
        "zips/val2014.zip",
        6_645_013_297,
        "a3d79f5ed8d289b7a7554ce06a5782b3",
        "val2014/COCO_val2014_*",
        40_504,
    ),
)


def download_coco(
    root: str | Path, *, source: str = SOURCE, archives: Sequence[Archive] = ARCHIVES
) -> str:
    """Download ROOT/annotations and ROOT/val2014 from a mirror and return a message.

    The sizes and the target folder are printed first. An interrupted download resumes when it is
    started again. An archive is deleted after it is unpacked.

    Raises:
        OSError: the disk is too small, or the source cannot be reached.
        ValueError: a downloaded file has another MD5.
    """
    root = Path(root)
    missing = [archive for archive in archives if not _is_unpacked(root, archive)]
    if not missing:
        return f"{root} already has all of MS-COCO val2014"
    root.mkdir(parents=True, exist_ok=True)
    sizes = [archive.size for archive in missing]
    needed = sum(sizes) + max(sizes) - sum(part.stat().st_size for part in root.glob("*.part"))
    free = shutil.disk_usage(root).free
    plan = f"{sum(sizes) / 1e9:.1f} GB to download, {needed / 1e9:.1f} GB of disk needed"
    print(f"MS-COCO val2014: {plan}, {free / 1e9:.1f} GB free in {root.resolve()}", flush=True)
    if free < needed:
        raise OSError(f"{root.resolve()} needs {needed / 1e9:.1f} GB of free disk space")
    for archive in missing:
        url = f"{source.rstrip('/')}/{archive.path}"
        try:
            _download(archive.part(root), archive.size, url)
        except OSError as error:
            raise OSError(f"cannot download {url} ({error}): run again to resume") from error
        _unpack(root, archive, url)
    return f"MS-COCO val2014 is in {root}"


def _download(part: Path, size: int, url: str) -> None:
    """Download the missing bytes of a file."""
    begun = part.stat().st_size if part.is_file() else 0
    if begun == size:
        return
    begun = begun if begun < size else 0
    request = Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
    with urlopen(request, timeout=60.0) as response:
        if response.status != 206:  # the server ignores ranges and sends the whole file
            begun = 0
        bar = tqdm(desc=part.stem, initial=begun, total=size, unit="B", unit_scale=True)
        with part.open("ab" if begun else "wb") as file, bar:
            while chunk := response.read(2**20):
                file.write(chunk)
                bar.update(len(chunk))
    if part.stat().st_size != size:
        raise ConnectionError(f"interrupted after {part.stat().st_size:,} of {size:,} bytes")


def _unpack(root: Path, archive: Archive, url: str) -> None:
    """Verify a download, unpack the selected members that do not exist yet, and delete it."""
    part = archive.part(root)
    with part.open("rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    if digest != archive.md5:
        part.unlink()
        raise ValueError(f"{url} has md5 {digest} instead of {archive.md5}: deleted, run again")
    with zipfile.ZipFile(part) as opened:
        members = [name for name in opened.namelist() if fnmatchcase(name, archive.pattern)]
        members = [name for name in members if name.count("/") == 1]  # a `*` also matches `/../`
        for name in tqdm(members, desc=f"unpacking {part.stem}", unit="file"):
            if not (root / name).exists():
                with atomic_write(root / name) as temporary:
                    temporary.write_bytes(opened.read(name))
    part.unlink()


def _is_unpacked(root: Path, archive: Archive) -> bool:
    found = sum(1 for _ in root.glob(archive.pattern))
    return found >= archive.members and not archive.part(root).exists()
