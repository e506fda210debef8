"""Small shards of images of one color, written quickly."""

import io

from PIL import Image

from unclip.data.prepare.resumable import write_samples

COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "white": (250,) * 3}


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
