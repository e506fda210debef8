"""Small shards of images of one color, written quickly, and a reader of shards."""

import io
import json

from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from unclip.data.prepare.resumable import write_samples

COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "white": (250,) * 3}


def read_shard(path):
    """Return the samples of a shard as webdataset reads them, with parsed json members."""
    with open(path, "rb") as stream:
        samples = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
    return [sample | {"json": json.loads(sample["json"])} for sample in samples]


def write_shards(root, *, splits=("train", "val"), sizes=(64,), images=24, shards=2):
    """Write ROOT/SPLIT/SIZE/*.tar with `images` samples each, and return ROOT."""
    for split in splits:
        for size in sizes:
            for shard in range(shards):
                samples = (_sample(index, size) for index in range(shard, images, shards))
                write_samples(root / split / str(size) / f"{shard:05d}.tar", samples)
    return root


def encode_png(image):
    encoded = io.BytesIO()
    image.save(encoded, "png")
    return encoded.getvalue()


def _sample(index, size):
    name = list(COLORS)[index % len(COLORS)]
    png = encode_png(Image.new("RGB", (size, size), COLORS[name]))
    captions = {"captions": [f"a {name} square", f"a square in {name}"]}
    return {"__key__": f"{index:08d}", "png": png, "json": captions}
