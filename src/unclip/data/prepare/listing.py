"""List images with their captions: of a folder, or of COCO.

A folder's captions are in NAME.txt, NAME.json or a table metadata.*, COCO's in
annotations/captions_SPLIT.json.
"""

import csv
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from unclip.data.bad_samples import BadSample
from unclip.data.reader import CAPTION_KEYS, decode_captions, decode_metadata, find_captions
from unclip.data.shards import MAX_TEXT_BYTES
from unclip.data.tar_headers import IMAGE_EXTENSIONS
from unclip.files import read_bytes, read_json, read_json_lines, read_text, split_lines
from unclip.images import FORMATS, image_format

OTHER_EXTENSIONS = (
    *("dng", "exr", "heic", "heif", "ico", "jfif", "jp2", "jpe", "jxl", "mpo", "pcx", "pgm"),
    *("ppm", "psd", "svg", "tga"),
)
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
FILE_COLUMN = "file_name"


class Record(NamedTuple):
    """An image with captions."""

    source: str  # unique name of the image in the data that it comes from
    path: Path
    captions: tuple[str, ...]  # at least one, none of them blank
    split: str | None = None  # train, val or test if the data has splits

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


def read_folder(root: str | Path, caption_column: str | None = None) -> Listing:
    """List the images below a folder with their captions.

    Captions are in a file next to the image (NAME.json, else NAME.txt with one caption per line),
    or in a table metadata.csv, .jsonl or .parquet in the same folder or one above it, whose
    file_name is relative to the table. The file takes precedence. Top-level folders `train` and
    `val` (or `validation`, `test`) become the splits. Hidden files are ignored, links are followed.
    `caption_column` is the tables' column of captions; None for captions, caption or text.

    Raises:
        FileNotFoundError: the folder does not exist or has no images.
        ValueError: a table cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder")
    rejected: list[Rejected] = []
    files = dict(sorted(_files(root, root, rejected)))
    table_captions = _read_tables(files, caption_column, rejected)
    top_folders = {name.split("/")[0] for name in files if "/" in name}
    has_splits = "train" in top_folders and len(top_folders & SPLITS.keys()) > 1
    records = []
    for name, path in files.items():
        if not _is_image(path):
            continue
        try:
            captions = _adjacent_captions(path)
        except BadSample as bad:
            if not (captions := table_captions.get(name)):
                rejected.append(Rejected(name, bad.kind, bad.detail))
                continue
        split = SPLITS.get(name.split("/")[0], "train") if has_splits else None
        records.append(Record(name, path, tuple(dict.fromkeys(captions)), split))
    if not records and not rejected:
        raise FileNotFoundError(f"no images ({', '.join(FORMATS)}) in {root}")
    return Listing(records, rejected)


def _files(
    folder: Path, root: Path, rejected: list[Rejected], parents: tuple[str, ...] = ()
) -> Iterator[tuple[str, Path]]:
    """Yield the name relative to `root`, in UTF-8, and the path of all files below a folder.

    Links are followed, except to one of the `parents`, the real paths of the folders above.
    Unreadable folders are added to `rejected`.
    """
    real = os.path.realpath(folder)
    if real in parents:
        return
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        rejected.append(Rejected(_name(folder, root), "unreadable folder", str(error)))
        return
    for path in paths:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files(path, root, rejected, (*parents, real))
        else:
            yield _name(path, root), path


def _name(path: Path, root: Path) -> str:
    return os.fsencode(path.relative_to(root)).decode("utf-8", "backslashreplace")


def _is_image(path: Path) -> bool:
    """Return whether a file has the name or the first bytes of an image."""
    extension = path.suffix[1:].lower()
    if extension in (*IMAGE_EXTENSIONS, *OTHER_EXTENSIONS):
        return True
    if extension in ("json", "txt") or not path.is_file():
        return False
    with suppress(OSError), open(path, "rb") as file:
        return image_format(file.read(1024)) in FORMATS
    return False


def _adjacent_captions(image: Path) -> list[str]:
    """Read the captions in NAME.json or NAME.txt; BadSample if there are none."""
    members = {}
    for extension in ("json", "txt"):
        path = image.with_suffix(f".{extension}")
        try:
            members[extension] = read_bytes(path, MAX_TEXT_BYTES)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise BadSample("unreadable caption file", str(error)) from None
    return decode_captions(members, decode_metadata(members))


def _read_tables(
    files: dict[str, Path], column: str | None, rejected: list[Rejected]
) -> dict[str, list[str]]:
    """Return the captions of all tables by file; add rows that match no file to `rejected`.

    A name that matches no file is compared in Unicode's composed form (NFC): macOS decomposes it.
    """
    captions: dict[str, list[str]] = {}
    composed = {unicodedata.normalize("NFC", name): name for name in files}
    for table in files:
        path = PurePosixPath(table)
        if path.stem != "metadata" or path.suffix not in _READERS:
            continue
        for file_name, texts in _read_table(files[table], column):
            # The name is only compared with the names of existing files, never opened.
            name = os.path.normpath((path.parent / file_name).as_posix())
            if name not in files:
                name = composed.get(unicodedata.normalize("NFC", name))
            if name is not None:
                captions.setdefault(name, []).extend(texts)
            else:
                rejected.append(Rejected(f"{table}: {file_name}", "no such file"))
    return captions


def _read_table(path: Path, column: str | None) -> Iterator[tuple[str, list[str]]]:
    columns = [column] if column else CAPTION_KEYS
    for number, row in enumerate(_READERS[path.suffix](path), start=1):
        if not isinstance(row, dict) or not isinstance(row.get(FILE_COLUMN), str):
            raise ValueError(f"{path}: row {number} has no {FILE_COLUMN}")
        if None in row:
            raise ValueError(f"{path}: row {number} has too many columns: quote its commas")
        if row.keys().isdisjoint(columns):
            raise ValueError(
                f"{path}: no column {' or '.join(columns)} among {', '.join(row)}: "
                "set --caption-column"
            )
        texts = []
        with suppress(BadSample):  # the image may have other captions
            texts = find_captions(row, columns)
        yield row[FILE_COLUMN], texts


def _read_csv(path: Path) -> Iterator[dict]:
    lines = (f"{line}\n" for line in split_lines(read_text(path)))
    try:
        yield from csv.DictReader(lines, skipinitialspace=True)
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from None


def _read_parquet(path: Path) -> Iterator[dict]:
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]  (an optional dependency)

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None


_READERS: dict[str, Callable[[Path], Iterator[dict]]] = {
    ".csv": _read_csv,
    ".jsonl": read_json_lines,
    ".parquet": _read_parquet,
}


class CocoImage(NamedTuple):
    """An image of a caption file; `captions` may be empty."""

    id: int
    file_name: str
    captions: tuple[str, ...]


def read_coco_captions(file: Path) -> list[CocoImage]:
    """Read a caption file: images in the order of their ids, captions in the order of theirs.

    Raises:
        ValueError: the file is not in COCO's format, or names an image outside its folder.
    """
    try:
        content = read_json(file)
        names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        captions: dict[int, list[str]] = {number: [] for number in names}
        for row in sorted(content["annotations"], key=lambda row: row.get("id", 0)):
            with suppress(BadSample):  # a blank caption; rows of other images are ignored
                captions.setdefault(int(row["image_id"]), []).extend(find_captions(row))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a COCO caption file ({error!r})") from None
    for name in names.values():
        if Path(name).name != name:
            raise ValueError(f"{file} names an image outside its folder: {name!r}")
    return [CocoImage(number, names[number], tuple(captions[number])) for number in sorted(names)]


def read_coco(root: str | Path) -> Listing:
    """List the images in ROOT/SPLITYEAR with their captions in annotations/captions_SPLITYEAR.json.

    Raises:
        FileNotFoundError: there are no caption files.
        ValueError: a caption file is not in COCO's format.
    """
    root = Path(root)
    tables = sorted((root / "annotations").glob("captions_*.json"))
    if not tables:
        raise FileNotFoundError(
            f"no captions_*.json in {root / 'annotations'}: unpack COCO's "
            "annotations_trainval2017.zip, train2017.zip and val2017.zip into one folder"
        )
    records, rejected = [], []
    for table in tables:
        folder = table.stem.removeprefix("captions_")
        split = SPLITS.get(folder.rstrip("0123456789"), "train")
        for image in read_coco_captions(table):
            source = f"{folder}/{image.file_name}"
            if not image.captions:
                rejected.append(Rejected(source, "missing caption"))
            elif not (root / source).is_file():
                rejected.append(Rejected(source, "no such file"))
            else:
                records.append(Record(source, root / source, image.captions, split))
    return Listing(records, rejected)
