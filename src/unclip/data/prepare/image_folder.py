"""List the images of a folder with captions in NAME.txt, NAME.json or a table metadata.*."""

import csv
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from unclip.data.bad_samples import BadSample
from unclip.data.prepare.inspection import Listing, Record, Rejected
from unclip.data.reader import CAPTION_KEYS, decode_captions, decode_metadata, find_captions
from unclip.data.shards import MAX_TEXT_BYTES
from unclip.data.tar_headers import IMAGE_EXTENSIONS
from unclip.files import read_bytes, read_json_lines, read_text, split_lines
from unclip.images import FORMATS, image_format

OTHER_EXTENSIONS = (
    *("dng", "exr", "heic", "heif", "ico", "jfif", "jp2", "jpe", "jxl", "mpo", "pcx", "pgm"),
    *("ppm", "psd", "svg", "tga"),
)
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
FILE_COLUMN = "file_name"


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
    name = os.fsencode(path.relative_to(root).as_posix())
    return name.decode("utf-8", "backslashreplace")


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
    """Return the captions of all tables by file; add rows that match no file to `rejected`."""
    captions: dict[str, list[str]] = {}
    for table in files:
        path = PurePosixPath(table)
        if path.stem != "metadata" or path.suffix not in _READERS:
            continue
        for file_name, texts in _read_table(files[table], column):
            # The name is only compared with the names of existing files, never opened.
            name = os.path.normpath((path.parent / file_name).as_posix())
            if name in files:
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
