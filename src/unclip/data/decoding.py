"""Decode the members of a sample: pictures through PIL, captions from json or txt, nothing else.

No other format is ever decoded, nothing is unpickled and nothing decompressed; what cannot be
decoded raises `BadSample`.
"""

import io
import json
import warnings
from collections.abc import Mapping

from PIL import Image

from unclip.data.bad_samples import BadSample
from unclip.data.shards import PICTURES
from unclip.images import to_rgb, upright

PICTURE_PIXELS = 32_000_000
FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}


def decode_picture(
    content: bytes,
    extension: str,
    *,
    minimum_size: int = 16,
    maximum_pixels: int = PICTURE_PIXELS,
) -> Image.Image:
    """An upright RGB picture from an encoded one; transparency becomes white.

    The size is checked by the header, before pixels are decoded, against `maximum_pixels` and
    PIL's own `Image.MAX_IMAGE_PIXELS`, whichever is lower.

    Args:
        content: the encoded picture.
        extension: jpg, jpeg, png or webp; other formats under that name are refused.
        minimum_size: the least width and height.
        maximum_pixels: the most pixels.

    Raises:
        BadSample: "picture too large", "picture too small" or "corrupt picture".
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content), formats=[FORMATS[extension]])
        width, height = picture.size
        if width * height > maximum_pixels:
            raise BadSample("picture too large", f"{width} × {height} pixels")
        if min(width, height) < minimum_size:
            raise BadSample("picture too small", f"{width} × {height} pixels")
        picture.load()
        return to_rgb(upright(picture))
    except BadSample:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadSample("picture too large", str(error)) from None
    except Exception as error:  # PIL's plugins raise almost anything on broken files
        raise BadSample("corrupt picture", f"{type(error).__name__}: {error}") from None


def find_picture(members: Mapping[str, bytes | None]) -> tuple[str, bytes]:
    """(extension, content) of the sample's picture.

    Raises:
        BadSample: "missing picture".
    """
    for extension in PICTURES:
        if (content := members.get(extension)) is not None:
            return extension, content
    raise BadSample("missing picture", f"it has {sorted(members) or 'nothing'}")


def decode_metadata(members: Mapping[str, bytes | None]) -> dict:
    """The json member as a dict; {} when there is none.

    Raises:
        BadSample: "bad json".
    """
    content = members.get("json")
    if content is None:
        return {}
    try:
        metadata = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad json", str(error)) from None
    if not isinstance(metadata, dict):
        raise BadSample("bad json", f"a {type(metadata).__name__} where an object is wanted")
    return metadata


def decode_captions(members: Mapping[str, bytes | None], metadata: Mapping) -> list[str]:
    """The captions of a sample, at least one, none of them blank.

    They are `captions` (a list) or `caption` of the json, else the txt member.

    Raises:
        BadSample: "missing caption", "bad json", "bad text" or "empty captions".
    """
    captions = metadata.get("captions", metadata.get("caption"))
    if captions is None:
        if (content := members.get("txt")) is None:
            raise BadSample("missing caption", f"it has {sorted(members) or 'nothing'}")
        try:
            captions = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSample("bad text", str(error)) from None
    if isinstance(captions, str):
        captions = [captions]
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise BadSample("bad json", "captions is not a list of strings")
    captions = [text.strip() for text in captions if text.strip()]
    if not captions:
        raise BadSample("empty captions")
    return captions
