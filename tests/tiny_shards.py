"""Small shards of images of one color, written quickly."""

import io
import json
import tarfile

from PIL import Image

COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "white": (250,) * 3}


def write_shards(root, *, splits=("train", "val"), sizes=(64,), images=24, shards=2):
    """Write ROOT/SPLIT/SIZE/*.tar with `images` samples each, and return ROOT."""
    names = list(COLORS)
    for split in splits:
        for size in sizes:
            folder = root / split / str(size)
            folder.mkdir(parents=True)
            for shard in range(shards):
                with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
                    for index in range(shard, images, shards):
                        name = names[index % len(names)]
                        encoded = io.BytesIO()
                        Image.new("RGB", (size, size), COLORS[name]).save(encoded, "png")
                        captions = [f"a {name} square", f"a square in {name}"]
                        text = json.dumps({"captions": captions}).encode()
                        _add(tar, f"{index:08d}.png", encoded.getvalue())
                        _add(tar, f"{index:08d}.json", text)
    return root


def _add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
