"""What a reader of somebody's data hands on: pictures with captions, and what it leaves out."""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple


class Entry(NamedTuple):
    """A picture that may become a sample.

    Attributes:
        source: its name in what it was read from, unique there.
        path: its file.
        captions: at least one, none blank.
        split: train, val or test where the data says so, else None.
    """

    source: str
    path: Path
    captions: tuple[str, ...]
    split: str | None = None

    @property
    def key(self) -> str:
        """A name for the sample: letters, digits and underscores, unique as the source is.

        Dots and slashes have a meaning in shards, and a hyphen marks a twin (`unclip.data.order`).
        """
        stem = re.sub(r"[^0-9A-Za-z]+", "_", Path(self.source).stem)[:40].strip("_")
        digest = hashlib.blake2b(self.source.encode(), digest_size=6).hexdigest()
        return f"{stem}_{digest}" if stem else digest


class Dropped(NamedTuple):
    """A picture, or a line about one, that does not become a sample, and why."""

    source: str
    reason: str
    detail: str = ""


class Found(NamedTuple):
    """All that was read, in the order of the sources' names."""

    entries: list[Entry]
    dropped: list[Dropped]
