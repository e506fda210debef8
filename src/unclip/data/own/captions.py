"""Captions as people keep them: NAME.txt, NAME.json, or a table metadata.csv, .jsonl, .parquet."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unclip.data.bad_samples import BadSample
from unclip.data.decoding import decode_captions, decode_metadata
from unclip.data.shards import TEXT_BYTES

TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
COLUMNS = ("captions", "caption", "text")  # in this order, unless a column is named
FILE_COLUMN = "file_name"


def beside(picture: Path) -> list[str] | None:
    """The captions in NAME.json (`captions` or `caption`), else NAME.txt (one a line).

    Returns:
        None where there is neither file.

    Raises:
        BadSample: there is one, but no captions can be read from it.
    """
    members = {}
    for extension in ("json", "txt"):
        path = picture.with_suffix(f".{extension}")
        if not path.is_file():
            continue
        if path.stat().st_size > TEXT_BYTES:
            raise BadSample("oversize caption file", f"{path.name}: over {TEXT_BYTES} bytes")
        members[extension] = path.read_bytes()
    if not members:
        return None
    captions = decode_captions(members, decode_metadata(members))
    return [line.strip() for caption in captions for line in caption.splitlines() if line.strip()]


def read_table(path: Path, column: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """(file name as it stands there, captions) of each line of a table.

    Args:
        path: a csv, jsonl or parquet file with a column "file_name".
        column: which column holds the captions (text, or a list of texts).

    Raises:
        ValueError: the table cannot be read, or has not these columns; it is named.
    """
    try:
        for number, row in enumerate(_ROWS[path.suffix](path), start=1):
            name, value = row.get(FILE_COLUMN), _caption(row, column, path)
            if not isinstance(name, str):
                raise ValueError(f"line {number} has no {FILE_COLUMN}")
            texts = value if isinstance(value, list) else [value]
            yield name, [str(text).strip() for text in texts if text and str(text).strip()]
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _caption(row: Mapping[str, Any], column: str | None, path: Path) -> Any:
    for name in (column,) if column else COLUMNS:
        if name in row:
            return row[name]
    wanted = column or " or ".join(COLUMNS)
    raise ValueError(f"no column {wanted} among {', '.join(map(str, row))}: say --caption-column")


def _csv(path: Path) -> Iterator[dict]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        yield from csv.DictReader(file)


def _jsonl(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            yield row


def _parquet(path: Path) -> Iterator[dict]:
    import pyarrow.parquet  # an extra: only who has such a table needs it

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None


_ROWS = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
