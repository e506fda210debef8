"""Import images with captions: inspect them, hold some out, and write shards of each size.

The same images and settings give the same bytes with any number of processes, and an interrupted
import can be resumed.
"""

import csv
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unclip.data.bad_samples import BadSample
from unclip.data.prepare.inspection import Accepted, inspect
from unclip.data.prepare.listing import Listing, Rejected
from unclip.data.prepare.resumable import ResumableBuild, run_jobs, write_samples
from unclip.data.reader import decode_image
from unclip.files import atomic_write, read_bytes, write_text
from unclip.images import fit, image_format

MAX_HELD_OUT = 5000
JPEG_QUALITY = 95
LOSSLESS = ("PNG", "GIF", "BMP", "TIFF")  # formats of images that become PNGs

Splits = dict[str, list[Accepted]]


class ShardPlan(NamedTuple):
    """A shard to write: the central squares of `images`, resized to `size` pixels."""

    path: Path
    split: str
    size: int
    images: Sequence[Accepted]


def import_images(
    listing: Listing,
    root: str | Path,
    *,
    sizes: Sequence[int] = (64, 256, 1024),
    val: int | None = None,
    shard_size: int = 1000,
    seed: int = 0,
    workers: int | None = None,
    overwrite: bool = False,
) -> str:
    """Write the data set into `root`, or complete it, and return a summary.

    Args:
        listing: images found by `read_folder` or `read_coco`.
        root: the data set's own folder.
        sizes: sides of the squares in pixels; each size gets the images that are at least as large.
        val: number of images held out if the data has no val split; None for 5%, at most 5000.
        shard_size: maximum number of images in a shard.
        seed: seed of the order of the images and of the choice of the held-out ones.
        workers: number of processes; None for one per core, 0 to run in this process.
        overwrite: whether to replace the shards of other images or settings in `root`.

    Raises:
        ValueError: sizes are too small or equal, no image is left to train on, or `root` holds
            something else.
    """
    if not sizes or min(sizes) < 16 or len(set(sizes)) != len(sizes):
        raise ValueError(f"sizes must be distinct and at least 16 pixels, not {sizes}")
    root = Path(root)
    build = ResumableBuild(root, "imported images")
    accepted, rejected = inspect(listing.records, root, smallest=min(sizes), workers=workers)
    splits = _split(accepted, val, sizes, seed)
    shards = list(_plan(root, splits, sizes, shard_size))
    summary = _write_report(root, shards, [*listing.rejected, *rejected])
    if not splits.get("train"):
        raise ValueError(f"{summary}\nno image is left to train on")
    settings = {"sizes": sizes, "val": val, "shard_size": shard_size, "seed": seed}
    counts = {f"{split} images": len(images) for split, images in splits.items()}
    if build.start({**settings, **counts, "digest": _digest(splits)}, overwrite=overwrite):
        missing = [shard for shard in shards if not shard.path.exists()]
        list(run_jobs(_write_shard, missing, workers, about="shards"))
        build.finish()
    return summary


def _split(
    accepted: Sequence[Accepted], val: int | None, sizes: Sequence[int], seed: int
) -> Splits:
    """Shuffle the images as a function of seed and source; hold some out unless the data does."""

    def random_order(image: Accepted) -> str:
        text = f"{seed}/{image.record.source}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    splits: Splits = {"train": []}
    for image in sorted(accepted, key=random_order):
        splits.setdefault(image.record.split or "train", []).append(image)
    if "val" not in splits:
        train = splits["train"]
        held_out = {image.record.source for image in _held_out(train, val, sizes)}
        splits["val"] = [image for image in train if image.record.source in held_out]
        splits["train"] = [image for image in train if image.record.source not in held_out]
    return dict(sorted(splits.items()))


def _held_out(order: Sequence[Accepted], val: int | None, sizes: Sequence[int]) -> list[Accepted]:
    """Choose `val` images for validation, in each size as large a share as in all of them.

    A size with at least two images has at least one of them in each split, unless `val` is 0.
    """
    if val is None:
        val = min(max(round(0.05 * len(order)), 1), MAX_HELD_OUT)
    if val >= len(order) > 0:
        raise ValueError(f"val={val} of {len(order)} images leaves none to train on")
    held_out: list[Accepted] = []
    larger = math.inf
    for size in sorted(sizes, reverse=True):
        large = [image for image in order if _side(image) >= size]
        wanted = min(-(-val * len(large) // max(len(order), 1)), max(len(large) - 1, 0))
        only_here = [image for image in large if _side(image) < larger]
        held_out += only_here[: max(wanted - len(held_out), 0)]
        larger = size
    return held_out


def _side(image: Accepted) -> int:
    return min(image.info.width, image.info.height)


def _plan(root: Path, splits: Splits, sizes: Sequence[int], shard_size: int) -> Iterator[ShardPlan]:
    """Plan the shards; those of a split and size hold about equally many images."""
    for split, images in splits.items():
        for size in sizes:
            large = [image for image in images if _side(image) >= size]
            shards = -(-len(large) // shard_size)
            for number in range(shards):
                part = slice(len(large) * number // shards, len(large) * (number + 1) // shards)
                path = root / split / str(size) / f"{number:05d}.tar"
                yield ShardPlan(path, split, size, large[part])


def _digest(splits: Splits) -> str:
    digest = hashlib.sha256()
    for split, images in splits.items():
        for record, info in images:
            line = [split, record.source, record.captions, info.digest]
            digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def _write_report(root: Path, shards: Sequence[ShardPlan], rejected: Sequence[Rejected]) -> str:
    """Write report.json and rejected.csv, and return a summary."""
    accepted: dict[str, Counter[int]] = {}
    for shard in shards:
        accepted.setdefault(shard.split, Counter())[shard.size] += len(shard.images)
    reasons = Counter(one.reason for one in rejected).most_common()
    content = {"accepted": accepted, "rejected": dict(reasons)}
    write_text(root / "report.json", json.dumps(content, indent=1) + "\n")
    with (
        atomic_write(root / "rejected.csv") as path,
        open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        csv.writer(file).writerows([Rejected._fields, *rejected])
    lines = [f"{root}:"]
    for split, sizes in accepted.items():
        counts = " · ".join(f"{count} at {size} px" for size, count in sizes.items())
        lines.append(f"  {split}: {counts}")
    if rejected:
        lines.append(f"  rejected {len(rejected)} (listed in {root / 'rejected.csv'}):")
        lines += [f"    {count} × {reason}" for reason, count in reasons]
    return "\n".join(lines)


def _write_shard(shard: ShardPlan) -> None:
    write_samples(shard.path, (_sample(image, shard.size) for image in shard.images))


def _sample(accepted: Accepted, size: int) -> dict[str, Any]:
    """Crop, resize and encode an image: lossless ones become PNGs, all others JPEGs (4:4:4)."""
    record, info = accepted
    try:
        content = read_bytes(record.path)
        image = decode_image(content)
        if image.size != (info.width, info.height):
            raise BadSample("other size")
    except (BadSample, OSError, ValueError) as error:
        raise ValueError(f"{record.path} changed during the import ({error}): run again") from None
    buffer = io.BytesIO()
    is_lossless = image_format(content) in LOSSLESS
    if is_lossless:
        fit(image, size).save(buffer, "PNG")
    else:
        fit(image, size).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    metadata = {
        "captions": record.captions,
        "source": record.source,
        "width": info.width,
        "height": info.height,
    }
    member = "png" if is_lossless else "jpg"
    return {"__key__": record.key, member: buffer.getvalue(), "json": metadata}
