"""Choices made by chance, as functions of (seed, epoch, key) alone.

So they do not depend on which worker of which rank reads a sample.
"""

import hashlib
import random
from collections.abc import Sequence


def seeded(*parts: str | int) -> random.Random:
    """A random generator that is a function of `parts`, the same in every process and run."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def choose_caption(captions: Sequence[str], *, seed: int, epoch: int, key: str) -> str:
    """One of the captions, each with equal chance."""
    return captions[seeded("caption", seed, epoch, key).randrange(len(captions))]


def random_corner(
    height: int, width: int, crop: int, *, seed: int, epoch: int, key: str, number: int = 0
) -> tuple[int, int]:
    """(top, left) of a crop × crop square, uniform over all places.

    `number` tells several crops of one picture apart.
    """
    randomness = seeded("crop", seed, epoch, key, number)
    return randomness.randint(0, height - crop), randomness.randint(0, width - crop)


def centre_corner(height: int, width: int, crop: int) -> tuple[int, int]:
    """(top, left) of the crop × crop square in the middle."""
    return (height - crop) // 2, (width - crop) // 2
