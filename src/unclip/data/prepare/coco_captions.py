"""Read COCO's caption files, annotations/captions_SPLIT.json."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from unclip.data.bad_samples import BadSample
from unclip.data.prepare.image_folder import SPLITS
from unclip.data.prepare.inspection import Listing, Record, Rejected
from unclip.data.reader import find_captions
from unclip.files import read_json


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
