"""Decode the bytes of a sample: images with Pillow, captions from json or txt, nothing else.

No other format is decoded, and nothing is unpickled or decompressed. Bytes that cannot be decoded
raise `BadSample`.
"""

import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from unclip.data.bad_samples import BadSample
from unclip.data.degradations import DEGRADATIONS, downsize
from unclip.data.order import rng
from unclip.data.shards import IMAGE_EXTENSIONS, RawSample
from unclip.images import fit, to_rgb, to_tensor, upright

MAX_IMAGE_PIXELS = 32_000_000
FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}

Sample = dict[str, Any]


def decode_image(content: bytes, extension: str, *, minimum_size: int = 16) -> Image.Image:
    """Decode an image to upright RGB; transparency becomes white.

    The size in the header is checked before any pixel is decoded, against `MAX_IMAGE_PIXELS` and
    Pillow's own `Image.MAX_IMAGE_PIXELS`, whichever is lower.

    Args:
        content: the encoded image.
        extension: jpg, jpeg, png or webp; content in another format is rejected.
        minimum_size: smallest width and height in pixels.

    Raises:
        BadSample: "image too large", "image too small" or "corrupt image".
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=[FORMATS[extension]])
        width, height = image.size
        if width * height > MAX_IMAGE_PIXELS:
            raise BadSample("image too large", f"{width} × {height} pixels")
        if min(width, height) < minimum_size:
            raise BadSample("image too small", f"{width} × {height} pixels")
        image.load()
        return to_rgb(upright(image))
    except BadSample:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadSample("image too large", str(error)) from None
    except Exception as error:  # Pillow's plugins raise almost anything on broken files
        raise BadSample("corrupt image", f"{type(error).__name__}: {error}") from None


def find_image(members: Mapping[str, bytes | None]) -> tuple[str, bytes]:
    """Return the extension and the encoded bytes of a sample's image.

    Raises:
        BadSample: "missing image".
    """
    for extension in IMAGE_EXTENSIONS:
        if (content := members.get(extension)) is not None:
            return extension, content
    raise BadSample("missing image", _names(members))


def _names(members: Mapping[str, bytes | None]) -> str:
    return f"the sample has {sorted(members) or 'no members'}"


def decode_metadata(members: Mapping[str, bytes | None]) -> dict:
    """Return the json member of a sample as a dict, or {} if there is none.

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
        raise BadSample("bad json", f"expected an object, not {type(metadata).__name__}")
    return metadata


def decode_captions(members: Mapping[str, bytes | None], metadata: Mapping) -> list[str]:
    """Return the captions of a sample: at least one, none of them blank.

    They are `captions` (a list) or `caption` in the json member, else the txt member.

    Raises:
        BadSample: "missing caption", "bad json", "bad text" or "empty captions".
    """
    captions = metadata.get("captions", metadata.get("caption"))
    if captions is None:
        if (content := members.get("txt")) is None:
            raise BadSample("missing caption", _names(members))
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


@dataclass(frozen=True, kw_only=True)
class SampleReader:
    """Turn raw samples into training samples, as a function of (seed, epoch, key) alone.

    A sample has `key`, `caption` and, depending on the settings, `image` (uint8, 3 × size × size)
    and `low_res` (uint8, the degraded small version of `image`).

    Args:
        image_size: width and height that images are resized to.
        random: choose captions and crops at random; otherwise take the first caption and the
            center crop.
        crop: side of the square crops in pixels (for upsamplers); None for whole images.
        crops_per_image: number of samples made from one decoded image.
        degradation: "gaussian_blur" or "bsr", which makes `low_res`; None for no `low_res`.
        clean_share: fraction of the samples whose `low_res` is downsized without degradation.
        load_image: whether to decode images.
        minimum_size: smallest width and height of an image; smaller images are bad samples.
        seed: seed of all random choices.
    """

    image_size: int = 64
    random: bool = True
    crop: int | None = None
    crops_per_image: int = 1
    degradation: str | None = None
    clean_share: float = 0.0
    load_image: bool = True
    minimum_size: int = 16
    seed: int = 0

    def __post_init__(self):
        if self.crop is not None and not 0 < self.crop <= self.image_size:
            raise ValueError(f"a crop of {self.crop} does not fit into {self.image_size} pixels")
        if self.crops_per_image < 1:
            raise ValueError(f"crops_per_image must be at least 1, not {self.crops_per_image}")
        if self.crops_per_image > 1 and (self.crop is None or not self.random):
            raise ValueError("crops_per_image above 1 needs a random crop: set crop")
        if not 0 <= self.clean_share <= 1:
            raise ValueError(f"clean_share must be between 0 and 1, not {self.clean_share}")
        if self.degradation not in (None, *DEGRADATIONS):
            known = ", ".join(DEGRADATIONS)
            raise ValueError(f"degradation must be one of {known}, not {self.degradation!r}")

    def __call__(self, raw: RawSample, *, epoch: int) -> list[Sample]:
        """Return the `crops_per_image` samples made from one raw sample.

        Raises:
            BadSample: part of the raw sample cannot be used.
        """
        if raw.bad is not None:
            raise raw.bad
        captions = decode_captions(raw.members, decode_metadata(raw.members))
        if self.random:
            captions = [rng("caption", self.seed, epoch, raw.key).choice(captions)]
        sample: Sample = {"key": raw.key, "caption": captions[0]}
        if not self.load_image:
            return [dict(sample) for _ in range(self.crops_per_image)]
        extension, content = find_image(raw.members)
        decoded = decode_image(content, extension, minimum_size=self.minimum_size)
        image = to_tensor(fit(decoded, self.image_size))
        return [
            sample | self._pixels(image, raw.key, epoch, number)
            for number in range(self.crops_per_image)
        ]

    def _pixels(self, image: Tensor, key: str, epoch: int, number: int) -> Sample:
        """Crop and degrade a decoded image; `number` distinguishes the crops of one image."""
        if self.crop is not None:
            room = self.image_size - self.crop
            top = left = room // 2
            if self.random:
                generator = rng("crop", self.seed, epoch, key, number)
                top, left = generator.randint(0, room), generator.randint(0, room)
            image = image[:, top : top + self.crop, left : left + self.crop].contiguous()
        if self.degradation is None:
            return {"image": image}
        seed = f"{self.seed}/{epoch}/{key}/{number}"
        clean = rng("clean", seed).random() < self.clean_share
        degrade = downsize if clean else DEGRADATIONS[self.degradation]
        return {"image": image, "low_res": degrade(image, seed=seed)}
