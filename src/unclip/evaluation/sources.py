"""Real images and their captions, from shards or from MS-COCO's folders.

A source lists the usable images of one split, and decodes those that are asked for.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unclip.data.bad_samples import BadSample, BadSamples
from unclip.data.prepare.listing import read_coco_captions
from unclip.data.reader import decode_captions, decode_image, decode_metadata, find_image
from unclip.data.shards import RawSample, Shard, open_shards, read_positions
from unclip.evaluation.distributed import Ranks
from unclip.evaluation.protocol import Item, Protocol
from unclip.files import read_json, write_text
from unclip.images import fit, to_tensor

DATA_COCO = "make data-coco"
_BLOCK, _THREADS = 256, 8  # images that are checked at once, by this many threads
_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True, eq=False)
class Source:
    """The usable images of one split, in the source's own order."""

    items: list[Item]
    fingerprint: str  # hash of ids, captions and file sizes; the same in another folder
    stamp: str  # hash of the same and of the files' times; a cache keyed by it notices a change
    # decodes the images of items at ascending indices as RGB
    images: Callable[[Sequence[int]], Iterator[Image.Image]]
    bad: dict[str, int]  # number of samples that were left out, by kind


@dataclass(frozen=True, eq=False)
class _Listing:
    """All samples of a split, before their images are decoded."""

    name: str
    names: list[tuple[Path, str]]  # shard or folder, and key or file name, of each sample
    samples: Sequence[Item | BadSample]
    stats: list[tuple[str, int, int]]  # name, size and time of each file
    # yields, for ascending indices, functions that decode the images
    load: Callable[[Sequence[int]], Iterator[Callable[[], Image.Image]]]


def open_source(
    root: str | Path,
    split: str,
    protocol: Protocol,
    *,
    cache: Path | None = None,
    ranks: Ranks | None = None,
    max_bad_fraction: float = 0.01,
    progress: bool = False,
) -> Source:
    """Open a split of the data that a protocol uses; bad samples are left out and counted.

    Every image is decoded once, before anything is sampled; all `ranks` share the work, and `cache`
    is a folder that remembers which images are bad. The protocol's format and resolution say where
    the images are.

    Raises:
        FileNotFoundError: it is missing; the message has the command that fetches it.
        ValueError: its annotations are damaged, or more than `max_bad_fraction` of its samples are
            bad.
    """
    if protocol.format == "coco":
        listing = _list_coco(Path(root), split)
    else:
        listing = _list_shards(Path(root) / split / str(protocol.resolution))
    usable = [k for k, one in enumerate(listing.samples) if isinstance(one, Item)]
    bad = {k: one for k, one in enumerate(listing.samples) if isinstance(one, BadSample)}
    stamp = _digest(listing, usable, times=True)
    file = cache and cache / f"bad-{stamp}.json"
    bad |= _bad_images(listing, usable, file, ranks or Ranks(), progress)
    counter = BadSamples(max_bad_fraction, len(listing.samples))
    for k, name in enumerate(listing.names):
        if k in bad:
            counter.record(*name, bad[k])
        counter.mark_seen()
    counter.finish()
    good = [k for k in usable if k not in bad]

    def images(indices: Sequence[int]) -> Iterator[Image.Image]:
        places = [good[k] for k in indices]
        for k, decode in zip(places, listing.load(places), strict=True):
            try:
                yield decode()
            except BadSample as error:
                path, name = listing.names[k]
                raise ValueError(f"{name} of {path} changed: run again ({error.kind})") from error

    items = [cast(Item, listing.samples[k]) for k in good]
    return Source(items, _digest(listing, good), stamp, images, dict(counter.kinds))


def _bad_images(
    listing: _Listing,
    indices: Sequence[int],
    file: Path | None,
    ranks: Ranks,
    progress: bool,
) -> dict[int, BadSample]:
    """Decode the images at some indices and return the errors, from `file` if it has them."""
    found = read_json(file) if file and ranks.first and file.is_file() else None
    if ranks.share(found is None):
        blocks = [indices[block.start : block.stop] for block in ranks.blocks(len(indices), _BLOCK)]
        bar = tqdm(blocks, "checking images", unit="block", leave=False, disable=not progress)
        with ThreadPoolExecutor(_THREADS) as pool:
            errors = [
                (k, error.kind, error.detail)
                for block in bar
                for k, error in zip(block, pool.map(_error, listing.load(block)), strict=True)
                if error is not None
            ]
        found = [row for rows in ranks.gather(errors) for row in rows]
        if file is not None and ranks.first:
            write_text(file, json.dumps(found) + "\n")
    return {k: BadSample(kind, detail) for k, kind, detail in ranks.share(found)}


def _error(decode: Callable[[], Image.Image]) -> BadSample | None:
    try:
        decode()
    except BadSample as bad:
        return bad
    return None


def _list_coco(root: Path, split: str) -> _Listing:
    """List ROOT/annotations/captions_SPLIT.json and ROOT/SPLIT: the images with a caption."""
    file, folder = root / "annotations" / f"captions_{split}.json", root / split
    for path in (file, folder):
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: download MS-COCO with `{DATA_COCO}`, or set COCO_ROOT to "
                "a folder with annotations/ and the images"
            )
    listed = [image for image in read_coco_captions(file) if image.captions]
    paths = [folder / image.file_name for image in listed]
    try:
        stats = [_stat(path) for path in paths]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error.filename} is listed in {file.name} and missing: run `{DATA_COCO}` again"
        ) from error

    def load(indices: Sequence[int]) -> Iterator[Callable[[], Image.Image]]:
        return (partial(_decode_file, paths[index]) for index in indices)

    names = [(folder, path.name) for path in paths]
    samples = [Item(f"{one.id:012d}", one.captions) for one in listed]
    return _Listing(split, names, samples, stats, load)


def _list_shards(folder: Path) -> _Listing:
    """List a folder ROOT/SPLIT/SIZE of shards."""
    shards = open_shards(folder)
    every = range(sum(shard.samples for shard in shards))
    names: list[tuple[Path, str]] = []
    samples: list[Item | BadSample] = []
    ids: set[str] = set()
    for _, raw in read_positions(shards, every, images=False):
        names.append((raw.shard, raw.key))
        try:
            item = _item(raw)
        except BadSample as bad:
            samples.append(bad)
            continue
        if item.id in ids:  # ids name files, and another shard may have the same key
            item = item._replace(id=f"{raw.shard.stem}-{item.id}")
        ids.add(item.id)
        samples.append(item)

    def load(indices: Sequence[int]) -> Iterator[Callable[[], Image.Image]]:
        return (partial(_image, raw) for raw in _read(shards, indices))

    stats = [_stat(shard.path) for shard in shards]
    return _Listing(folder.name, names, samples, stats, load)


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

    images: UInt8[Tensor, "count 3 size size"]
    captions: list[str]  # the first caption of each image
    metadata: list[dict[str, Any]]  # the JSON of each image; {} if it has none

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, rows: Sequence[int]) -> "Real":
        """Return some of the images, in the order of `rows`."""
        captions = [self.captions[row] for row in rows]
        return Real(self.images[list(rows)], captions, [self.metadata[row] for row in rows])


def read_real(root: str | Path, split: str, size: int, *, count: int | None = None) -> Real:
    """Load the first `count` samples of ROOT/SPLIT/SIZE, or all of them, without the bad ones."""
    shards = open_shards(Path(root) / split / str(size))
    total = sum(shard.samples for shard in shards)
    samples = []
    for raw in _read(shards, range(total if count is None else min(count, total))):
        with suppress(BadSample):
            samples.append((_item(raw), to_tensor(fit(_image(raw), size))))
    if not samples:
        raise ValueError(f"the shards of {Path(root) / split / str(size)} are empty")
    items, images = zip(*samples, strict=True)
    captions = [item.captions[0] for item in items]
    return Real(torch.stack(images), captions, [dict(item.about) for item in items])


def _decode_file(path: Path) -> Image.Image:
    return decode_image(path.read_bytes(), minimum_size=1)


def _read(shards: Sequence[Shard], indices: Sequence[int]) -> Iterator[RawSample]:
    """Read the samples at ascending positions."""
    if len(indices):
        wanted, line = set(indices), range(indices[0], indices[-1] + 1)
        yield from (raw for _, raw in read_positions(shards, line, wanted=wanted.__contains__))


def _image(raw: RawSample) -> Image.Image:
    if raw.bad is not None:
        raise raw.bad
    return decode_image(find_image(raw.members))


def _item(raw: RawSample) -> Item:
    if raw.bad is not None:
        raise raw.bad
    about = decode_metadata(raw.members)
    return Item(raw.key, tuple(decode_captions(raw.members, about)), about)


def _stat(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return path.name, found.st_size, found.st_mtime_ns


def _digest(listing: _Listing, rows: Sequence[int], *, times: bool = False) -> str:
    """Hash samples' ids and captions, and all files' names and sizes, with `times` also times."""
    items = [cast(Item, listing.samples[k])[:2] for k in rows]
    stats = listing.stats if times else [stat[:2] for stat in listing.stats]
    return hashlib.sha256(repr((listing.name, items, stats)).encode()).hexdigest()[:16]
