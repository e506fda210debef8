"""Shards of plain coloured pictures, written in no time."""

import io
import json
import tarfile

from PIL import Image

COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "white": (250,) * 3}


def write_shards(root, *, splits=("train", "val"), sizes=(64,), pictures=24, shards=2):
    """ROOT/SPLIT/SIZE/*.tar, `pictures` in each split and size; returns ROOT."""
    names = list(COLORS)
    for split in splits:
        for size in sizes:
            folder = root / split / str(size)
            folder.mkdir(parents=True)
            for shard in range(shards):
                with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
                    for index in range(shard, pictures, shards):
                        name = names[index % len(names)]
                        picture = io.BytesIO()
                        Image.new("RGB", (size, size), COLORS[name]).save(picture, "png")
                        captions = [f"a {name} square", f"a square in {name}"]
                        text = json.dumps({"captions": captions}).encode()
                        _add(tar, f"{index:08d}.png", picture.getvalue())
                        _add(tar, f"{index:08d}.json", text)
    return root


def _add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
