"""List the images of a folder with captions in NAME.txt, NAME.json or a table metadata.*."""

import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from unclip.data.bad_samples import BadSample
from unclip.data.prepare.inspection import Listing, Record, Rejected
from unclip.data.reader import decode_captions, decode_metadata
from unclip.data.shards import MAX_TEXT_BYTES
from unclip.data.tar_headers import IMAGE_EXTENSIONS

OTHER_FORMATS = ("avif", "bmp", "gif", "heic", "heif", "jp2", "jxl", "svg", "tif", "tiff")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
CAPTION_COLUMNS = ("captions", "caption", "text")  # the first one that a table has is used
FILE_COLUMN = "file_name"


def read_folder(root: str | Path, caption_column: str | None = None) -> Listing:
    """List the images below a folder with their captions.

    Captions are in a file next to the image (NAME.json, else NAME.txt with one caption per line),
    or in a table metadata.csv, .jsonl or .parquet in the same folder or one above it, whose
    file_name is relative to the table. The file takes precedence. Top-level folders `train` and
    `val` (or `validation`, `test`) become the splits. Hidden files are ignored. `caption_column` is
    the column of the captions in the tables; None for captions, caption or text.

    Raises:
        FileNotFoundError: the folder does not exist or has no images.
        ValueError: a table cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder")
    files = sorted(_files(root))
    table_captions, rejected = _read_tables(root, files, caption_column)
    top_folders = {name.split("/")[0] for name in files if "/" in name}
    has_splits = "train" in top_folders and len(top_folders & SPLITS.keys()) > 1
    records = []
    for name in files:
        extension = name.rpartition(".")[2].lower()
        if extension not in (*IMAGE_EXTENSIONS, *OTHER_FORMATS):
            continue
        try:
            if extension in OTHER_FORMATS:
                raise BadSample("other format", f"convert it to {', '.join(IMAGE_EXTENSIONS)}")
            captions = _adjacent_captions(root / name) or table_captions.get(name)
            if not captions:
                raise BadSample("missing caption")
        except BadSample as bad:
            rejected.append(Rejected(name, bad.kind, bad.detail))
        else:
            split = SPLITS.get(name.split("/")[0], "train") if has_splits else None
            records.append(Record(name, root / name, tuple(dict.fromkeys(captions)), split))
    if not records and not rejected:
        raise FileNotFoundError(f"no images ({', '.join(IMAGE_EXTENSIONS)}) in {root}")
    return Listing(records, rejected)


def _files(root: Path) -> Iterator[str]:
    """Yield the names of all files relative to `root`; links to folders are not followed."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _adjacent_captions(image: Path) -> list[str] | None:
    """Read NAME.json or NAME.txt; return None if neither exists."""
    members = {}
    for extension in ("json", "txt"):
        path = image.with_suffix(f".{extension}")
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise BadSample("oversize caption file", f"{path.name}: over {MAX_TEXT_BYTES} bytes")
        members[extension] = path.read_bytes()
    if not members:
        return None
    captions = decode_captions(members, decode_metadata(members))
    return [line.strip() for caption in captions for line in caption.splitlines() if line.strip()]


def _read_tables(
    root: Path, files: list[str], column: str | None
) -> tuple[dict[str, list[str]], list[Rejected]]:
    """Return the captions of all tables by file, and the table rows that match no file."""
    captions: dict[str, list[str]] = {}
    rejected = []
    known = set(files)
    for table in files:
        path = PurePosixPath(table)
        if path.stem != "metadata" or path.suffix not in _READERS:
            continue
        for file_name, texts in _read_table(root / table, column):
            # The name is only compared with the names of existing files, never opened.
            name = os.path.normpath((path.parent / file_name).as_posix())
            if name in known:
                captions.setdefault(name, []).extend(texts)
            else:
                rejected.append(Rejected(f"{table}: {file_name}", "no such file"))
    return captions, rejected


def _read_table(path: Path, column: str | None) -> Iterator[tuple[str, list[str]]]:
    try:
        for number, row in enumerate(_READERS[path.suffix](path), start=1):
            if not isinstance(row, dict) or not isinstance(row.get(FILE_COLUMN), str):
                raise ValueError(f"line {number} has no {FILE_COLUMN}")
            found = [name for name in ([column] if column else CAPTION_COLUMNS) if name in row]
            if not found:
                raise ValueError(
                    f"no column {column or ' or '.join(CAPTION_COLUMNS)} among "
                    f"{', '.join(map(str, row))}: set --caption-column"
                )
            value = row[found[0]]
            texts = value if isinstance(value, list) else [value]
            yield row[FILE_COLUMN], [str(text).strip() for text in texts if str(text or "").strip()]
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_csv(path: Path) -> Iterator[dict]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        yield from csv.DictReader(file)


def _read_jsonl(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.strip())


def _read_parquet(path: Path) -> Iterator[dict]:
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]  (an optional dependency)

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None


_READERS: dict[str, Callable[[Path], Iterator[dict]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
