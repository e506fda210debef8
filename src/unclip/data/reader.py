"""Decode the bytes of a sample: an image, and captions from json or txt.

Nothing is unpickled or decompressed. Bytes that cannot be decoded raise `BadSample`. Captions of
files, tables, shards and manifests are all read by `find_captions`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from unclip import images
from unclip.data.bad_samples import BadSample
from unclip.data.degradations import DEGRADATIONS, downsize
from unclip.data.order import rng
from unclip.data.shards import RawSample
from unclip.data.tar_headers import IMAGE_EXTENSIONS
from unclip.files import decode_text, parse_json, split_lines
from unclip.images import fit, to_tensor

MAX_IMAGE_PIXELS = 32_000_000
MAX_CAPTION_LENGTH = 2000  # in characters: more than fit into the context of any CLIP
CAPTION_KEYS = ("captions", "caption", "text")

Sample = dict[str, Any]


def decode_image(content: bytes, *, minimum_size: int = 16) -> Image.Image:
    """Decode an image of at least `minimum_size` pixels as `unclip.images.decode_image` does.

    Raises:
        BadSample: the image cannot be decoded, or its size is out of range.
    """
    try:
        image = images.decode_image(content, max_pixels=MAX_IMAGE_PIXELS)
    except images.ImageError as error:
        raise BadSample(error.kind, error.detail) from None
    if min(image.size) < minimum_size:
        raise BadSample("image too small", f"{image.width} × {image.height} pixels")
    return image


def find_image(members: Mapping[str, bytes | None]) -> bytes:
    """Return the encoded bytes of a sample's image.

    Raises:
        BadSample: "missing image".
    """
    for extension in IMAGE_EXTENSIONS:
        if (content := members.get(extension)) is not None:
            return content
    raise BadSample("missing image", f"the sample has {sorted(members) or 'no members'}")


def decode_metadata(members: Mapping[str, bytes | None]) -> dict:
    """Return the json member of a sample as a dict, or {} if there is none.

    Anything but an object is taken for the captions.

    Raises:
        BadSample: "bad json".
    """
    content = members.get("json")
    if content is None:
        return {}
    try:
        metadata = parse_json(content, "json")
    except ValueError as error:
        raise BadSample("bad json", str(error)) from None
    return metadata if isinstance(metadata, dict) else {"captions": metadata}


def decode_captions(members: Mapping[str, bytes | None], metadata: Mapping) -> list[str]:
    """Return the captions of a sample: those of the metadata, else the lines of the txt member.

    Raises:
        BadSample: "missing caption", "bad caption", "bad text" or "empty captions".
    """
    try:
        return find_captions(metadata)
    except BadSample:
        if (content := members.get("txt")) is None:
            raise
    try:
        return find_captions({"text": split_lines(decode_text(content, "txt"))})
    except ValueError as error:
        raise BadSample("bad text", str(error)) from None


def find_captions(metadata: Mapping, keys: Sequence[str] = CAPTION_KEYS) -> list[str]:
    """Return the captions under the first of some keys that has any: at least one, none blank.

    A value is a caption or a list of captions, which may be a string with a JSON list, as in the
    cell of a table; null and blank captions are skipped. A newline or other whitespace in a caption
    becomes one space, and a caption ends after `MAX_CAPTION_LENGTH`.

    Raises:
        BadSample: "missing caption", "empty captions", or "bad caption" if there are only values
            of other types.
    """
    found = []
    for key in keys:
        found += [one for one in _listed(metadata.get(key)) if one is not None]
        texts = (" ".join(one.replace("\0", "").split()) for one in found if isinstance(one, str))
        if captions := [text[:MAX_CAPTION_LENGTH].rstrip() for text in texts if text]:
            return captions
    if not all(isinstance(one, str) for one in found):
        raise BadSample("bad caption", "a caption is a string or a list of strings")
    if found or any(metadata.get(key) is not None for key in keys):
        raise BadSample("empty captions")
    raise BadSample("missing caption", f"none of {', '.join(keys)} in {list(metadata)}"[:200])


def _listed(value: Any) -> list:
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            listed = parse_json(value, "caption")
            if all(isinstance(one, str | None) for one in listed):
                return listed
    return value if isinstance(value, list) else [value]


@dataclass(frozen=True, kw_only=True)
class SampleReader:
    """Turn raw samples into training samples, as a function of (seed, epoch, key) alone.

    A sample has `key`, `caption` and, depending on the settings, `image` (uint8, 3 × size × size),
    `low_res` (uint8, the degraded small version of `image`) and `labels`.

    Args:
        image_size: width and height that images are resized to.
        random: choose captions and crops at random; otherwise take the first caption and the
            center crop.
        crop: side of the square crops in pixels (for upsamplers); None for whole images.
        crops_per_image: number of samples made from one decoded image.
        degradation: "gaussian_blur" or "bsr", which makes `low_res`; None for no `low_res`.
        clean_share: fraction of the samples whose `low_res` is downsized without degradation.
        load_image: whether to decode images.
        labels: turns the json member into `labels`; None for none.
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
    labels: Callable[[Mapping[str, Any]], Tensor] | None = None
    minimum_size: int = 16
    seed: int = 0

    def __post_init__(self):
        if self.crop is not None and not 0 < self.crop <= self.image_size:
            raise ValueError(f"a crop of {self.crop} does not fit into {self.image_size} pixels")
        if self.crops_per_image > 1 and (self.crop is None or not self.random):
            raise ValueError("crops_per_image above 1 needs a random crop: set crop")
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
        metadata = decode_metadata(raw.members)
        captions = decode_captions(raw.members, metadata)
        if self.random:
            captions = [rng("caption", self.seed, epoch, raw.key).choice(captions)]
        sample: Sample = {"key": raw.key, "caption": captions[0]}
        if not self.load_image:
            return [dict(sample) for _ in range(self.crops_per_image)]
        if self.labels is not None:
            sample["labels"] = self.labels(metadata)
        decoded = decode_image(find_image(raw.members), minimum_size=self.minimum_size)
        image = to_tensor(fit(decoded, self.image_size))
        numbers = range(self.crops_per_image)
        return [sample | self._pixels(image, raw.key, epoch, number) for number in numbers]

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
