"""Real images and their captions, from shards or from MS-COCO's folders.

A source lists the images of one split without decoding them, and decodes those that are asked for.
"""

import hashlib
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


@dataclass(frozen=True, eq=False)
class Source:
    """The images of one split, in the source's own order."""

    items: list[Item]
    fingerprint: str  # hash of ids, captions and file sizes; the same in another folder
    stamp: str  # hash of the same and of the files' times; a cache keyed by it notices a change
    # function that decodes the images of items at ascending indices as RGB; a damaged image is an
    # error, because measured on other images, a number would mean something else
    images: Callable[[Sequence[int]], Iterator[Image.Image]]


def open_source(root: str | Path, split: str, protocol: Protocol) -> Source:
    """Open a split of the data that a protocol uses.

    Raises:
        FileNotFoundError: it is missing; the message has the command that fetches it.
        ValueError: its annotations are damaged.
    """
    if protocol.format == "coco":
        return _open_coco(Path(root), split)
    return _open_shards(Path(root) / split / str(protocol.resolution))


def _open_coco(root: Path, split: str) -> Source:
    """Open ROOT/annotations/captions_SPLIT.json and ROOT/SPLIT: the images with a caption."""
    file, folder = root / "annotations" / f"captions_{split}.json", root / split
    for path in (file, folder):
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: download MS-COCO with `{DATA_COCO}`, or set COCO_ROOT to "
                "a folder with annotations/ and the images"
            )
    listed = [image for image in read_coco_captions(file) if image.captions]
    paths = [folder / image.file_name for image in listed]
    items = [Item(f"{image.id:012d}", image.captions) for image in listed]
    try:
        stats = [_stat(path) for path in paths]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error.filename} is listed in {file.name} and missing: run `{DATA_COCO}` again"
        ) from error

    def images(indices: Sequence[int]) -> Iterator[Image.Image]:
        return (open_image_file(paths[index]) for index in indices)

    return Source(
        items, _digest(items, [stat[:2] for stat in stats]), _digest(items, stats), images
    )


def _open_shards(folder: Path) -> Source:
    """Open a folder ROOT/SPLIT/SIZE of shards."""
    shards = open_shards(folder)
    stats = [_stat(shard.path) for shard in shards]
    every = range(sum(shard.samples for shard in shards))
    items = list(_decode(shards, every, _item, with_images=False))
    captions = [item[:2] for item in items]

    def images(indices: Sequence[int]) -> Iterator[Image.Image]:
        return _decode(shards, indices, _image)

    fingerprint = _digest(folder.name, captions, [stat[:2] for stat in stats])
    return Source(items, fingerprint, _digest(folder.name, captions, stats), images)


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


@dataclass(frozen=True)
class Real:
    """Real images of one size, in the order of their shards."""

    images: UInt8[Tensor, "count 3 size size"]  # the images
    captions: list[str]  # the first caption of each image
    metadata: list[dict[str, Any]]  # the JSON of each image; {} if it has none

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, rows: Sequence[int]) -> "Real":
        """Return some of the images, in the order of `rows`."""
        captions = [self.captions[row] for row in rows]
        return Real(self.images[list(rows)], captions, [self.metadata[row] for row in rows])


def read_real(root: str | Path, split: str, size: int, *, count: int | None = None) -> Real:
    """Load the first `count` samples of ROOT/SPLIT/SIZE, or all of them."""
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
    """Open an image file as RGB."""
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
    """Read and decode the samples at ascending positions."""
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
