"""A shard of one's own pictures: each a middle square of the wanted size, with its captions."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import webdataset
from PIL import Image

from unclip.data.bad_samples import BadSample
from unclip.data.decoding import decode_picture
from unclip.data.own.examine import Good
from unclip.files import atomic_write
from unclip.images import fit

JPEG_QUALITY = 95


def write_shard(path: Path, pictures: Sequence[Good], size: int) -> str:
    """Write a shard unless it is there, byte for byte the same each time; returns its sha256.

    JPEGs and lossy pictures become JPEGs of quality 95 without color subsampling, PNGs stay
    lossless.

    Raises:
        ValueError: a picture has changed since it was examined.
    """
    if not path.exists():
        with (
            atomic_write(path) as temporary,
            open(temporary, "wb") as stream,
            webdataset.TarWriter(stream, user="unclip", group="unclip", mtime=0) as tar,
        ):
            for good in pictures:
                tar.write(_sample(good, size))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sample(good: Good, size: int) -> dict[str, str | bytes]:
    entry = good.entry
    try:
        extension = entry.path.suffix[1:].lower()
        picture = decode_picture(entry.path.read_bytes(), extension)
        if picture.size != (good.width, good.height):
            raise BadSample("changed")
    except (BadSample, OSError) as error:
        raise ValueError(f"{entry.path} has changed meanwhile ({error}): run again") from None
    member, content = _encoded(fit(picture, size), lossless=extension == "png")
    about = {
        "captions": entry.captions,
        "source": entry.source,
        "width": good.width,
        "height": good.height,
    }
    text = json.dumps(about, ensure_ascii=False, separators=(",", ":"))
    return {"__key__": entry.key, member: content, "json": text.encode()}


def _encoded(picture: Image.Image, *, lossless: bool) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    if lossless:
        picture.save(buffer, "PNG")
        return "png", buffer.getvalue()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "jpg", buffer.getvalue()
