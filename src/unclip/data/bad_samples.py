"""Bad-sample accounting: error kinds, and the tolerated fraction per pass."""

import contextlib
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from unclip.files import read_json

logger = logging.getLogger(__name__)


def prepare_command(path: Path) -> str:
    """Guess from the folders of a shard the command that makes its data set."""
    for root in path.parents:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            if read_json(root / "dataset.json")["settings"]["data"] == "imported images":
                return f"`python src/prepare.py folder DIR {root}`, with more images of that size"
        if root.name == "coco" or (root / "annotations").is_dir():
            return f"`python src/prepare.py coco {root} OUT`, and add data=folder data.root=OUT"
    if any(root.name.startswith("emoji") for root in path.parents):
        return "`python src/prepare.py emoji`"
    return "`python src/prepare.py folder DIR OUT`, and add data=folder data.root=OUT"


@dataclass(eq=False)
class BadSample(Exception):
    """Raised for a sample that cannot be used; samples are counted by `kind`."""

    kind: str
    detail: str = ""


class BadSamples:
    """Count the bad samples of one pass in one process, and stop the pass if there are too many.

    Every worker counts its own samples, so no process has to wait for another.

    Args:
        max_fraction: tolerated fraction of bad samples.
        expected: number of samples in the whole pass.
    """

    min_seen = 50  # samples seen before a pass can be stopped
    window = 1000  # the tolerated fraction applies to this many samples, or to a shorter pass

    def __init__(self, max_fraction: float, expected: int):
        self.max_fraction, self.expected = max_fraction, expected
        self.seen = 0
        self.kinds: Counter[str] = Counter()
        self.last = ""  # key and shard of the last bad sample

    @property
    def bad(self) -> int:
        """Number of bad samples so far."""
        return self.kinds.total()

    def record(self, shard: Path, key: str, bad: BadSample) -> None:
        """Count a bad sample; log the first and every 1000th."""
        self.kinds[bad.kind] += 1
        self.last = f"sample {key!r} of {shard}"
        if self.bad == 1 or self.bad % 1000 == 0:
            where = f"{self.last} {bad.detail}".rstrip()
            logger.warning("bad sample %d: %s in %s", self.bad, bad.kind, where)

    def mark_seen(self) -> None:
        """Count one more sample as seen, after it was decoded or recorded as bad.

        Raises:
            ValueError: more than `max_fraction` of the samples are bad.
        """
        self.seen += 1
        if not self.kinds:
            return
        # One bad sample among the first hundred must not stop a pass over a million, so the
        # fraction applies to at least `window` samples (or to the whole pass if it is shorter).
        tolerated = self.max_fraction * max(self.seen, min(self.expected, self.window))
        if self.seen >= self.min_seen and self.bad > tolerated:
            raise ValueError(
                f"{self.bad} of {self.seen} samples are bad ({self}), more than the tolerated "
                f"{self.max_fraction:.2%}; the last one is {self.last}. Replace the bad ones, or "
                "tolerate more with +data.max_bad_fraction=FRACTION."
            )

    def finish(self) -> None:
        """Log a summary of the samples that the pass skipped."""
        if self.bad:
            logger.warning("skipped %d of %d samples as bad: %s", self.bad, self.seen, self)

    def __str__(self) -> str:
        return ", ".join(f"{kind}: {count}" for kind, count in self.kinds.most_common())
