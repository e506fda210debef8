"""Small tar shards for the tests of unclip.data."""

import io
import itertools
import json
from pathlib import Path

import webdataset
from PIL import Image

from unclip.data.loader import ShardDataset, ShardLoader
from unclip.data.reader import SampleReader

READER = SampleReader(image_size=16)


def flat_image(number: int, size: int = 16) -> bytes:
    """A PNG of one color that identifies `number`."""
    return encoded(Image.new("RGB", (size, size), (number % 256, number // 256, 7)))


def encoded(pixels: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    pixels.save(buffer, kind, **options)
    return buffer.getvalue()


def captions(key: str) -> list[str]:
    return [f"{key} caption {i}" for i in range(5)]


def sample(number: int, size: int = 16) -> dict:
    key = f"{number:08}"
    text = json.dumps({"captions": captions(key), "index": number})
    return {"__key__": key, "png": flat_image(number, size), "json": text.encode()}


def keys(sizes: list[int]) -> list[str]:
    """The keys of the samples that `write_shards` writes."""
    return [f"{number:08}" for number in range(sum(sizes))]


def write_shard(path: Path, samples: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), mtime=0, encoder=False) as writer:
        for one in samples:
            writer.write(one)
    return path


def write_shards(folder: Path, sizes: list[int], *, size: int = 16) -> Path:
    """Write shards of `sizes` samples each."""
    numbers = itertools.count()
    for i, samples in enumerate(sizes):
        rows = [sample(number, size) for number in itertools.islice(numbers, samples)]
        write_shard(folder / f"{i:05}.tar", rows)
    return folder


def load(source, reader=READER, *, workers=0, **options) -> ShardLoader:
    return ShardLoader(ShardDataset(source, reader, **options), workers=workers)


def valid_keys(batches, *, padding=False) -> list[str]:
    return [
        key
        for batch in batches
        for key, valid in zip(batch["key"], batch["valid"].tolist(), strict=True)
        if valid or padding
    ]
