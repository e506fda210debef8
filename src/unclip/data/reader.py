"""Make a sample from the bytes that stand in a shard."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unclip.data.choosing import centre_corner, choose_caption, random_corner, seeded
from unclip.data.decoding import (
    PICTURE_PIXELS,
    decode_captions,
    decode_metadata,
    decode_picture,
    find_picture,
)
from unclip.data.degradations import Degradation, downsize, named
from unclip.data.shards import RawSample
from unclip.images import fit, to_tensor

Sample = dict[str, str | bool | dict | Tensor]


@dataclass(frozen=True, kw_only=True)
class SampleReader:
    """Makes samples from the bytes in a shard, as a function of (seed, epoch, key) alone.

    A sample has `key`, `caption` and, as asked for, `image` (uint8, 3 × size × size), `low_res`
    (uint8, the corrupted small version of `image`) and `metadata` (the whole json).

    Args:
        image_size: width and height that pictures are brought to.
        caption: "random" draws one of a sample's captions, "first" takes the first.
        crop: side of the square that is cut out of the picture (a quarter, for upsamplers).
        random_crop: cut it anywhere, or in the middle.
        crops_per_image: samples that are made from one decoded picture.
        degradation: "gaussian_blur", "bsr" or a callable (image, *, seed); makes `low_res`.
        clean_share: share of the samples whose `low_res` is `downsize`'s, without the degradation.
        load_image: False leaves the pictures alone.
        metadata: give the json, too.
        minimum_size: smaller pictures are bad samples.
        maximum_pixels: larger pictures are bad samples.
        seed: of all choices.
    """

    image_size: int = 64
    caption: Literal["random", "first"] = "random"
    crop: int | None = None
    random_crop: bool = True
    crops_per_image: int = 1
    degradation: str | Degradation | None = None
    clean_share: float = 0.0
    load_image: bool = True
    metadata: bool = False
    minimum_size: int = 16
    maximum_pixels: int = PICTURE_PIXELS
    seed: int = 0

    def __post_init__(self):
        if self.caption not in ("random", "first"):
            raise ValueError(f"caption is 'random' or 'first', not {self.caption!r}")
        if self.crop is not None and not 0 < self.crop <= self.image_size:
            raise ValueError(f"a crop of {self.crop} does not fit into {self.image_size} pixels")
        if self.crops_per_image < 1:
            raise ValueError(f"crops_per_image is at least 1, not {self.crops_per_image}")
        if self.crops_per_image > 1 and (self.crop is None or not self.random_crop):
            raise ValueError("crops_per_image above 1 needs a random crop: set crop")
        if not 0 <= self.clean_share <= 1:
            raise ValueError(f"clean_share is a share, from 0 to 1, not {self.clean_share}")
        if self.degradation is not None:
            named(self.degradation)  # an unknown name is an error now, not in a worker

    def __call__(self, raw: RawSample, *, epoch: int) -> list[Sample]:
        """The `crops_per_image` samples of a raw one.

        Raises:
            BadSample: something in it cannot be used.
        """
        if raw.bad is not None:
            raise raw.bad
        metadata = decode_metadata(raw.members)
        captions = decode_captions(raw.members, metadata)
        caption = captions[0]
        if self.caption == "random":
            caption = choose_caption(captions, seed=self.seed, epoch=epoch, key=raw.key)
        sample: Sample = {"key": raw.key, "caption": caption}
        if self.metadata:
            sample["metadata"] = metadata
        if not self.load_image:
            return [dict(sample) for _ in range(self.crops_per_image)]
        extension, content = find_picture(raw.members)
        picture = decode_picture(
            content,
            extension,
            minimum_size=self.minimum_size,
            maximum_pixels=self.maximum_pixels,
        )
        image = to_tensor(fit(picture, self.image_size))
        return [
            sample | self._pixels(image, raw.key, epoch, number)
            for number in range(self.crops_per_image)
        ]

    def _pixels(self, image: Tensor, key: str, epoch: int, number: int) -> Sample:
        if self.crop is not None:
            corner = centre_corner(*image.shape[-2:], self.crop)
            if self.random_crop:
                corner = random_corner(
                    *image.shape[-2:],
                    self.crop,
                    seed=self.seed,
                    epoch=epoch,
                    key=key,
                    number=number,
                )
            top, left = corner
            image = image[:, top : top + self.crop, left : left + self.crop].contiguous()
        if self.degradation is None:
            return {"image": image}
        seed = f"{self.seed}/{epoch}/{key}/{number}"
        clean = seeded("clean", seed).random() < self.clean_share
        degrade = downsize if clean else named(self.degradation)
        return {"image": image, "low_res": degrade(image, seed=seed)}


def collate(samples: Sequence[Sample]) -> dict[str, list | Tensor]:
    """A batch: tensors stacked, `valid` a bool tensor, everything else in lists."""
    batch = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        batch[name] = torch.stack(values) if isinstance(first, Tensor) else values
    batch["valid"] = torch.tensor(batch["valid"])
    return batch
