"""Real pictures to measure against: a split's first samples, each with its captions and objects."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from unclip.data.bad_samples import BadSample
from unclip.data.reader import decode_captions, decode_image, decode_metadata, find_image
from unclip.data.shards import RawSample, open_shards, read_positions
from unclip.images import fit, to_tensor


@dataclass(frozen=True)
class Real:
    """Pictures of one size, in the order of their shards."""

    images: UInt8[Tensor, "count 3 size size"]
    captions: list[str]  # the first, full one of each picture
    metadata: list[dict[str, Any]]  # each picture's json; {} where it has none

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, rows: list[int]) -> "Real":
        """Some of the pictures, in the order of `rows`."""
        captions = [self.captions[row] for row in rows]
        return Real(self.images[rows], captions, [self.metadata[row] for row in rows])


def read_real(root: str | Path, split: str, size: int, *, count: int | None = None) -> Real:
    """The first `count` samples of ROOT/SPLIT/SIZE, or as many as there are.

    Nothing is skipped: measured on other pictures, a number would mean something else.

    Raises:
        FileNotFoundError: there are no such shards.
        ValueError: a sample is damaged.
    """
    shards = open_shards(Path(root) / split / str(size))
    total = sum(shard.samples for shard in shards)
    wanted = range(total if count is None else min(count, total))
    decoded = [_decode(sample, size) for _, sample in read_positions(shards, wanted)]
    if not decoded:
        raise ValueError(f"the shards of {Path(root) / split / str(size)} are empty")
    images, captions, metadata = zip(*decoded, strict=True)
    return Real(torch.stack(images), list(captions), list(metadata))


def _decode(sample: RawSample, size: int) -> tuple[Tensor, str, dict[str, Any]]:
    try:
        if sample.bad is not None:
            raise sample.bad
        extension, content = find_image(sample.members)
        image = to_tensor(fit(decode_image(content, extension), size))
        metadata = decode_metadata(sample.members)
        return image, decode_captions(sample.members, metadata)[0], metadata
    except BadSample as bad:
        raise ValueError(
            f"sample {sample.key!r} of {sample.shard} is damaged ({bad.kind}): write it again with "
            "src/prepare.py"
        ) from bad
