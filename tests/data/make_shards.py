"""Small tar shards for the tests of unclip.data."""

import io
import json
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from unclip.data.loader import ShardDataset, ShardLoader
from unclip.data.reader import SampleReader

READER = SampleReader(image_size=16)


def flat_image(number: int, size: int = 16, *, kind: str = "PNG", **options) -> bytes:
    """An encoded image of one color that identifies `number`."""
    pixels = np.full((size, size, 3), (number % 256, number // 256, 7), np.uint8)
    return encoded(Image.fromarray(pixels), kind, **options)


def encoded(pixels: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    pixels.save(buffer, kind, **options)
    return buffer.getvalue()


def captions(key: str) -> list[str]:
    return [f"{key} caption {i}" for i in range(5)]


def sample(number: int, key: str | None = None, size: int = 16) -> dict:
    key = f"{number:08}" if key is None else key
    text = json.dumps({"captions": captions(key), "index": number})
    return {"__key__": key, "png": flat_image(number, size), "json": text.encode()}


def write_shard(path: Path, samples: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), mtime=0, encoder=False) as writer:
        for one in samples:
            writer.write(one)
    return path


def write_shards(folder: Path, sizes: list[int], *, size: int = 16, pairs: bool = False) -> Path:
    """Shards of `sizes` samples each; with `pairs`, every second sample is a twin."""
    number = 0
    for i, samples in enumerate(sizes):
        rows = []
        for place in range(samples):
            twin = pairs and place % 2 == 1
            key = f"{number - 1:08}-swap" if twin else None
            rows.append(sample(number, key, size))
            number += 1
        write_shard(folder / f"{i:05}.tar", rows)
    return folder


def keys(sizes: list[int]) -> list[str]:
    return [f"{number:08}" for number in range(sum(sizes))]


def load(source, reader=READER, *, workers=0, **options) -> ShardLoader:
    return ShardLoader(ShardDataset(source, reader, **options), workers=workers)


def valid_keys(batches, *, padding=False) -> list[str]:
    return [
        key
        for batch in batches
        for key, valid in zip(batch["key"], batch["valid"].tolist(), strict=True)
        if valid or padding
    ]
