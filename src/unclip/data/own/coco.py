"""COCO's captions: annotations/captions_train2017.json and the folders of pictures beside."""

import json
from pathlib import Path

from unclip.data.own.entries import Dropped, Entry, Found
from unclip.data.own.folder import SPLITS


def read_coco(root: str | Path) -> Found:
    """The pictures of COCO's captions of any year, each with all its captions.

    Args:
        root: has annotations/captions_SPLITYEAR.json and the folders SPLITYEAR.

    Raises:
        FileNotFoundError: there are no captions.
        ValueError: a file of captions is not in COCO's format.
    """
    root = Path(root)
    tables = sorted((root / "annotations").glob("captions_*.json"))
    if not tables:
        raise FileNotFoundError(
            f"no captions_*.json in {root / 'annotations'}: unpack COCO's "
            "annotations_trainval2017.zip, train2017.zip and val2017.zip in one folder"
        )
    entries, dropped = [], []
    for table in tables:
        part = table.stem.removeprefix("captions_")
        split = SPLITS.get(part.rstrip("0123456789"), "train")
        for name, captions in sorted(_read(table).items()):
            source = f"{part}/{name}"
            if not captions:
                dropped.append(Dropped(source, "missing caption"))
            elif not (root / source).is_file():
                dropped.append(Dropped(source, "no such picture"))
            else:
                entries.append(Entry(source, root / source, tuple(captions), split))
    return Found(entries, dropped)


def _read(table: Path) -> dict[str, list[str]]:
    """Captions by file name."""
    try:
        content = json.loads(table.read_text(encoding="utf-8"))
        names = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
        captions: dict[str, list[str]] = {name: [] for name in names.values()}
        for annotation in content["annotations"]:
            if text := annotation["caption"].strip():
                captions[names[annotation["image_id"]]].append(" ".join(text.split()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{table} is not in COCO's captions format: {error!r}") from None
    return captions
