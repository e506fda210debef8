"""Real images and their captions, from shards or from MS-COCO's folders.

A source lists the images of one split without decoding them, and decodes those that are asked for.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from unclip.data.bad_samples import BadSample
from unclip.data.prepare.coco_captions import read_coco_captions
from unclip.data.reader import decode_captions, decode_image, decode_metadata, find_image
from unclip.data.shards import RawSample, Shard, open_shards, read_positions
from unclip.evaluation.protocol import Item, Protocol
from unclip.images import fit, to_tensor

T = TypeVar("T")

DATA_COCO = "make data-coco"
_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}


class Source(ABC):
    """The images of one split.

    Attributes:
        items: every image, in the source's own order.
        fingerprint: hash of ids, captions and file sizes; the same in another folder.
        stamp: the same with the files' times; a cache keyed by it notices a change.
    """

    items: list[Item]
    fingerprint: str
    stamp: str

    @abstractmethod
    def images(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Decode the images of some items as RGB.

        Args:
            indices: positions in `items`, ascending.

        Raises:
            ValueError: an image is damaged. Nothing is skipped: measured on other images, a number
                would mean something else.
        """


def open_source(root: str | Path, split: str, protocol: Protocol) -> Source:
    """Open a split of the data that a protocol uses.

    Raises:
        FileNotFoundError: it is missing; the message has the command that fetches it.
        ValueError: its annotations are damaged.
    """
    if protocol.format == "coco":
        return CocoSource(Path(root), split)
    return ShardSource(Path(root) / split / str(protocol.resolution))


def crop_and_resize(image: Image.Image, protocol: Protocol) -> UInt8[Tensor, "3 size size"]:
    """Crop and resize an image as the protocol says; one of the right size is left alone."""
    size = protocol.resolution
    if image.size != (size, size):
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side) if protocol.crop == "centre" else None
        image = image.resize((size, size), _FILTERS[protocol.filter], box=box)
    return to_tensor(image)


def load_images(
    source: Source, indices: Sequence[int], protocol: Protocol
) -> UInt8[Tensor, "count 3 size size"]:
    """Load some real images, cropped and resized as the protocol says."""
    return torch.stack([crop_and_resize(image, protocol) for image in source.images(indices)])


class CocoSource(Source):
    """ROOT/annotations/captions_SPLIT.json and the images of ROOT/SPLIT.

    Images are ordered by id; those without a caption are left out.
    """

    def __init__(self, root: Path, split: str) -> None:
        file, folder = root / "annotations" / f"captions_{split}.json", root / split
        for path in (file, folder):
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing: download MS-COCO with `{DATA_COCO}`, or set COCO_ROOT to "
                    "a folder with annotations/ and the images"
                )
        listed = [image for image in read_coco_captions(file) if image.captions]
        self._paths = [folder / image.file_name for image in listed]
        self.items = [Item(f"{image.id:012d}", image.captions) for image in listed]
        try:
            stats = [_stat(path) for path in self._paths]
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error.filename} is listed in {file.name} and missing: run `{DATA_COCO}` again"
            ) from error
        self.fingerprint = _digest(self.items, [stat[:2] for stat in stats])
        self.stamp = _digest(self.items, stats)

    def images(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Decode the images of some items."""
        for index in indices:
            yield open_image_file(self._paths[index])


class ShardSource(Source):
    """A folder ROOT/SPLIT/SIZE of shards, in their order.

    Raises:
        FileNotFoundError: there are no such shards.
    """

    def __init__(self, folder: Path) -> None:
        self._shards = open_shards(folder)
        stats = [_stat(shard.path) for shard in self._shards]
        every = range(sum(shard.samples for shard in self._shards))
        self.items = list(_decode(self._shards, every, _item, with_images=False))
        captions = [item[:2] for item in self.items]
        self.fingerprint = _digest(folder.name, captions, [stat[:2] for stat in stats])
        self.stamp = _digest(folder.name, captions, stats)

    def images(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """Decode the images of some items."""
        yield from _decode(self._shards, indices, _image)


@dataclass(frozen=True)
class Real:
    """Real images of one size, in the order of their shards.

    Attributes:
        images: the images.
        captions: the first caption of each image.
        metadata: the JSON of each image; {} if it has none.
    """

    images: UInt8[Tensor, "count 3 size size"]
    captions: list[str]
    metadata: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, rows: Sequence[int]) -> "Real":
        """Return some of the images, in the order of `rows`."""
        captions = [self.captions[row] for row in rows]
        return Real(self.images[list(rows)], captions, [self.metadata[row] for row in rows])


def read_real(root: str | Path, split: str, size: int, *, count: int | None = None) -> Real:
    """Load the first `count` samples of ROOT/SPLIT/SIZE, or all of them.

    Raises:
        FileNotFoundError: there are no such shards.
        ValueError: a sample is damaged.
    """
    shards = open_shards(Path(root) / split / str(size))
    total = sum(shard.samples for shard in shards)
    wanted = range(total if count is None else min(count, total))
    samples = list(
        _decode(shards, wanted, lambda raw: (to_tensor(fit(_image(raw), size)), _item(raw)))
    )
    if not samples:
        raise ValueError(f"the shards of {Path(root) / split / str(size)} are empty")
    images, items = zip(*samples, strict=True)
    captions = [item.captions[0] for item in items]
    return Real(torch.stack(images), captions, [dict(item.about) for item in items])


def open_image_file(path: Path) -> Image.Image:
    """Open an image file as RGB.

    Raises:
        ValueError: it is damaged, or in a format that is not read.
    """
    try:
        return decode_image(path.read_bytes(), minimum_size=1)
    except BadSample as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _decode(
    shards: Sequence[Shard],
    indices: Sequence[int],
    decode: Callable[[RawSample], T],
    *,
    with_images: bool = True,
) -> Iterator[T]:
    """Read and decode the samples at ascending positions.

    Raises:
        ValueError: a sample is damaged.
    """
    if not len(indices):
        return
    wanted, line = set(indices), range(indices[0], indices[-1] + 1)
    for _, raw in read_positions(shards, line, wanted=wanted.__contains__, images=with_images):
        try:
            if raw.bad is not None:
                raise raw.bad
            yield decode(raw)
        except BadSample as bad:
            raise ValueError(
                f"sample {raw.key!r} of {raw.shard} is damaged ({bad.kind}): write the data again "
                "with src/prepare.py"
            ) from bad


def _image(raw: RawSample) -> Image.Image:
    return decode_image(find_image(raw.members))


def _item(raw: RawSample) -> Item:
    about = decode_metadata(raw.members)
    return Item(raw.key, tuple(decode_captions(raw.members, about)), about)


def _stat(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return path.name, found.st_size, found.st_mtime_ns


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
