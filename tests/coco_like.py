"""A folder like MS-COCO's val2014, in layout and oddities, with small images.

`python tests/coco_like.py OUT` writes all 40,504 images in half a minute; then
`make eval-coco COCO_ROOT=OUT COUNT=1000` evaluates on it.
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image

IMAGES = 40_504  # of val2014, with 202,654 captions
PNG_CALLED_JPG = 320_612  # the id of COCO's one image with the wrong name
WORDS = (
    ("A", "Two", "Several", "A group of", "The", "A close up of a"),
    ("red", "small", "wooden", "young", "black and white", "parked", "large"),
    ("bus", "dog", "giraffes", "man", "woman", "train", "pizza", "clock", "cats", "vase"),
    ("sitting on", "standing next to", "in front of", "looking at", "on top of", "near"),
    ("a table.", "a wooden bench.", "the side of the road", "some trees.", "a kitchen sink."),
)


def write_coco(root: Path, images: int = IMAGES, split: str = "val2014") -> Path:
    """Write ROOT/annotations/captions_SPLIT.json and ROOT/SPLIT, and return ROOT."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir()
    generator = random.Random(split)
    ids = sorted({PNG_CALLED_JPG, *generator.sample(range(42, 581_930), images)})[-images:]
    listed = []
    for k, number in enumerate(ids):
        name = f"COCO_{split}_{number:012d}.jpg"
        image, options = _image(k, number)
        image.save(root / split / name, **options)
        entry = {"license": number % 8 + 1, "width": image.width, "height": image.height}
        listed.append({"id": number, "file_name": name, **entry})
    generator.shuffle(listed)
    rows = [(image["id"], text) for k, image in enumerate(listed) for text in _captions(k)]
    generator.shuffle(rows)
    annotations = [
        {"image_id": image, "id": 37 + 4 * k, "caption": text}
        for k, (image, text) in enumerate(rows)
    ]
    more = {"info": {"year": 2014}, "licenses": [{"id": k} for k in range(1, 9)]}
    content = more | {"images": listed, "annotations": annotations}
    (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    return root


def _image(k: int, number: int) -> tuple[Image.Image, dict]:
    """Return an image and its options of saving; one of each eleven is odd."""
    color = (k % 251, k // 251, number % 239)
    image = Image.new("RGB", (64, 48) if k % 3 else (48, 64), color)
    image.paste((255 - color[0], 90, color[2]), (10, 10, 40, 30))
    jpeg: dict = {"format": "JPEG", "quality": 90}
    if number == PNG_CALLED_JPG:
        return image, {"format": "PNG"}
    if k % 11:
        return image, jpeg
    rotated, profile = Image.Exif(), bytes(range(256)) * 12  # not an ICC profile
    rotated[0x0112] = 6  # by 90 degrees
    odd = [
        (image.convert("L"), jpeg),
        (image.convert("CMYK"), jpeg),
        (image, jpeg | {"exif": rotated}),
        (image.resize((64, 1)), jpeg),
        (image, jpeg | {"icc_profile": profile, "progressive": True}),
    ]
    return odd[k // 11 % 5]


def _captions(k: int) -> list[str]:
    """Return five or six captions; some are duplicates or have newlines or spaces at the end."""
    generator = random.Random(k)
    count = 6 if k % 300 == 0 else 5
    texts = [" ".join(generator.choice(words) for words in WORDS) for _ in range(count)]
    texts[0] += ("", "\n", "  ", " \n\n", "")[k % 5]
    if k % 7 == 0:
        texts[1] = texts[2]
    if k % 50 == 0:
        texts[3] = "A man riding a wave\non top of a surfboard."
    return texts


if __name__ == "__main__":
    print(write_coco(Path(sys.argv[1]), *map(int, sys.argv[2:])))
