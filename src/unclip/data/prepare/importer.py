"""Import images with captions: inspect them, hold some out, and write shards of each size.

The same images and settings give the same bytes with any number of processes, and an interrupted
import can be resumed.
"""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import webdataset
from PIL import Image
from tqdm import tqdm

from unclip.data.bad_samples import BadSample
from unclip.data.prepare.inspection import Accepted, Listing, Rejected, inspect
from unclip.data.prepare.resumable import ResumableBuild, run_jobs
from unclip.data.reader import decode_image
from unclip.files import atomic_write, write_text
from unclip.images import fit

MAX_HELD_OUT = 5000
JPEG_QUALITY = 95

Splits = dict[str, list[Accepted]]


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """Settings of an import.

    Args:
        sizes: sides of the squares in pixels; each size gets the images that are at least as large.
        val: number of images held out if the data has no splits; None for 5%, at most 5000.
        shard_size: maximum number of images in a shard.
        seed: seed of the order and of the images that are held out.
    """

    sizes: tuple[int, ...] = (64, 256, 1024)
    val: int | None = None
    shard_size: int = 1000
    seed: int = 0

    def __post_init__(self):
        if not self.sizes or min(self.sizes) < 16 or len(set(self.sizes)) != len(self.sizes):
            raise ValueError(f"sizes must be distinct and at least 16 pixels, not {self.sizes}")
        if self.shard_size < 1 or (self.val is not None and self.val < 0):
            raise ValueError(f"shard_size {self.shard_size} or val {self.val} is out of range")


def import_images(
    listing: Listing,
    root: str | Path,
    settings: ImportSettings,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> str:
    """Write the data set into `root`, or complete it, and return a summary.

    Args:
        listing: images found by `read_folder` or `read_coco`.
        root: the data set's own folder.
        settings: settings of the import.
        workers: number of processes; None for one per core, 0 to run in this process.
        overwrite: whether to replace the shards of other images or settings in `root`.
        progress: whether to show progress bars.

    Raises:
        ValueError: no image is left to train on, or `root` holds something else.
    """
    root = Path(root)
    build = ResumableBuild(root, "imported images")
    accepted, rejected = inspect(
        listing.records, root, smallest=min(settings.sizes), workers=workers, progress=progress
    )
    splits = _split(accepted, settings)
    shards = list(_plan(root, splits, settings))
    summary = _write_report(root, shards, [*listing.rejected, *rejected])
    if not splits.get("train"):
        raise ValueError(f"{summary}\nno image is left to train on")
    counts = {f"{split} images": len(images) for split, images in splits.items()}
    record = {**asdict(settings), **counts, "digest": _digest(splits)}
    if build.start(record, overwrite=overwrite):
        jobs = [(_write_shard, shard) for shard in shards if not shard[0].exists()]
        with tqdm(total=len(jobs), desc="shards", unit="shard", disable=not progress) as bar:
            for _ in run_jobs(jobs, workers):
                bar.update()
        build.finish()
    return summary


def _split(accepted: Sequence[Accepted], settings: ImportSettings) -> Splits:
    """Shuffle the images as a function of seed and source, and split them."""

    def random_order(image: Accepted) -> str:
        text = f"{settings.seed}/{image.record.source}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    order = sorted(accepted, key=random_order)
    if any(image.record.split for image in order):
        splits: Splits = {}
        for image in order:
            splits.setdefault(image.record.split or "train", []).append(image)
        return dict(sorted(splits.items()))
    val = settings.val
    if val is None:
        val = min(max(round(0.05 * len(order)), 1), MAX_HELD_OUT)
    if val >= len(order) > 0:
        raise ValueError(f"val={val} of {len(order)} images leaves none to train on")
    return {"train": order[val:], "val": order[:val]}


def _plan(
    root: Path, splits: Splits, settings: ImportSettings
) -> Iterator[tuple[Path, list[Accepted], int]]:
    """Yield (path, images, size) of each shard; the shards of a size are about equally large."""
    for split, images in splits.items():
        for size in settings.sizes:
            large = [image for image in images if min(image.info.width, image.info.height) >= size]
            shards = -(-len(large) // settings.shard_size)
            for number in range(shards):
                part = slice(len(large) * number // shards, len(large) * (number + 1) // shards)
                yield root / split / str(size) / f"{number:05d}.tar", large[part], size


def _digest(splits: Splits) -> str:
    digest = hashlib.sha256()
    for split, images in splits.items():
        for record, info in images:
            line = [split, record.source, record.captions, info.digest]
            digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def _write_report(
    root: Path, shards: Sequence[tuple[Path, list[Accepted], int]], rejected: Sequence[Rejected]
) -> str:
    """Write report.json and rejected.csv, and return a summary."""
    accepted: dict[str, Counter[int]] = {}
    for path, images, size in shards:
        accepted.setdefault(path.parts[-3], Counter())[size] += len(images)
    reasons = Counter(one.reason for one in rejected).most_common()
    content = {"accepted": accepted, "rejected": dict(reasons)}
    write_text(root / "report.json", json.dumps(content, indent=1) + "\n")
    with (
        atomic_write(root / "rejected.csv") as path,
        open(path, "w", newline="", encoding="utf-8") as file,
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


def _write_shard(path: Path, images: Sequence[Accepted], size: int) -> None:
    """Write the central squares of images with their captions; the bytes are reproducible.

    PNGs stay lossless, all other images become JPEGs without chroma subsampling.
    """
    with (
        atomic_write(path) as temporary,
        open(temporary, "wb") as stream,
        webdataset.TarWriter(stream, user="unclip", group="unclip", mtime=0) as tar,
    ):
        for image in images:
            tar.write(_sample(image, size))


def _sample(accepted: Accepted, size: int) -> dict[str, str | bytes]:
    record, info = accepted
    extension = record.path.suffix[1:].lower()
    try:
        image = decode_image(record.path.read_bytes(), extension)
        if image.size != (info.width, info.height):
            raise BadSample("other size")
    except (BadSample, OSError) as error:
        raise ValueError(f"{record.path} changed during the import ({error}): run again") from None
    member, content = _encode(fit(image, size), lossless=extension == "png")
    metadata = {
        "captions": record.captions,
        "source": record.source,
        "width": info.width,
        "height": info.height,
    }
    text = json.dumps(metadata, ensure_ascii=False, separators=(",", ":"))
    return {"__key__": record.key, member: content, "json": text.encode()}


def _encode(image: Image.Image, *, lossless: bool) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "PNG")
        return "png", buffer.getvalue()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "jpg", buffer.getvalue()
