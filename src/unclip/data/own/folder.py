"""A folder of pictures with captions beside them or in a table."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from unclip.data.bad_samples import BadSample
from unclip.data.own.captions import TABLES, beside, read_table
from unclip.data.own.entries import Dropped, Entry, Found
from unclip.data.shards import PICTURES

OTHER_PICTURES = ("avif", "bmp", "gif", "heic", "heif", "jp2", "jxl", "svg", "tif", "tiff")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def read_folder(root: str | Path, caption_column: str | None = None) -> Found:
    """The pictures below a folder, with their captions.

    Captions stand beside a picture (NAME.json, else NAME.txt with one a line) or in a table
    metadata.csv, .jsonl or .parquet of its folder or one above, whose file_name is relative to the
    table; what stands beside comes first. Folders `train` and `val` (or `validation`, `test`) at
    the top give the splits. Hidden files are left alone.

    Args:
        root: the folder.
        caption_column: of the tables; captions, caption or text when None.

    Raises:
        FileNotFoundError: there is no such folder, or not one picture in it.
        ValueError: a table cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder")
    files = sorted(_files(root))
    tables = [name for name in files if PurePosixPath(name).name in TABLES]
    listed, dropped = _listed(root, tables, set(files), caption_column)
    tops = {name.split("/")[0] for name in files if "/" in name}
    splits = SPLITS if "train" in tops and len(tops & SPLITS.keys()) > 1 else {}
    entries = []
    for name in files:
        extension = name.rpartition(".")[2].lower()
        if extension in OTHER_PICTURES:
            detail = f"{extension}: save it as {', '.join(PICTURES)}"
            dropped.append(Dropped(name, "other format", detail))
        if extension not in PICTURES:
            continue
        try:
            captions = beside(root / name) or listed.get(name)
        except BadSample as bad:
            dropped.append(Dropped(name, bad.kind, bad.detail))
            continue
        if not captions:
            dropped.append(Dropped(name, "missing caption"))
            continue
        split = splits.get(name.split("/")[0], "train") if splits else None
        entries.append(Entry(name, root / name, tuple(dict.fromkeys(captions)), split))
    if not entries and not dropped:
        raise FileNotFoundError(f"no pictures ({', '.join(PICTURES)}) in {root}")
    return Found(entries, dropped)


def _files(root: Path) -> Iterator[str]:
    """Names of the files below `root`, relative to it; no link to a folder is followed."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _listed(
    root: Path, tables: list[str], files: set[str], column: str | None
) -> tuple[dict[str, list[str]], list[Dropped]]:
    """The captions that tables give to files, and their lines that belong to no file."""
    captions: dict[str, list[str]] = {}
    dropped = []
    for table in tables:
        above = PurePosixPath(table).parent
        for file_name, texts in read_table(root / table, column):
            name = os.path.normpath((above / file_name).as_posix())  # a name, never opened as such
            if name in files:
                captions.setdefault(name, []).extend(texts)
            else:
                dropped.append(Dropped(f"{table}: {file_name}", "no such picture"))
    return captions, dropped
