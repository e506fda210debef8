"""Bad samples: what they are, and how many of them a pass over the data bears."""

import logging
from collections import Counter
from pathlib import Path

logger = logging.getLogger(__name__)

PREPARE = "python src/prepare.py emoji"  # the command that makes shards


class BadSample(Exception):
    """A sample that cannot be used; `kind` is what it is counted under."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail


class BadSamples:
    """Counts the bad samples of one pass in one process, and stops the pass when there are many.

    Every worker counts its own share: a worker sees what is wrong with the data as soon as
    another, and no process has to wait for one.

    Args:
        max_fraction: the part of the samples that may be bad.
        expected: how many samples the pass will see.
    """

    at_least = 50  # samples seen before a pass is stopped
    window = 1000  # so many samples, or the whole pass if it is shorter, may share the allowance

    def __init__(self, max_fraction: float, expected: int):
        self.max_fraction = max_fraction
        self.expected = expected
        self.seen = 0
        self.kinds: Counter[str] = Counter()
        self.last: Path | None = None  # the shard of the last bad one

    @property
    def bad(self) -> int:
        """Bad samples so far."""
        return self.kinds.total()

    def record(self, shard: Path, key: str, bad: BadSample) -> None:
        """Count and remember `bad`; log the first and every 1000th."""
        self.kinds[bad.kind] += 1
        self.last = shard
        if self.bad == 1 or self.bad % 1000 == 0:
            what = (self.bad, bad.kind, shard, key, bad.detail)
            logger.warning("bad sample %d: %s in %s, sample %r %s", *what)

    def saw(self) -> None:
        """Count one more sample as seen, after it was found good or recorded as bad.

        Raises:
            ValueError: more than `max_fraction` is bad.
        """
        self.seen += 1
        if not self.kinds:
            return
        # One bad sample among the first hundred must not stop a pass over a million: the
        # allowance is that of the window, or of the whole pass where that is shorter.
        allowance = self.max_fraction * max(self.seen, min(self.expected, self.window))
        if self.seen >= self.at_least and self.bad > allowance:
            raise ValueError(
                f"{self.bad} of {self.seen} samples are bad ({self}), more than the allowed "
                f"{self.max_fraction:.2%}; the last was in {self.last}. Write that shard again "
                f"(`{PREPARE}` for the emoji scenes) or raise max_bad_fraction."
            )

    def finish(self) -> None:
        """Log what a finished pass has skipped."""
        if self.bad:
            logger.warning("skipped %d of %d samples as bad: %s", self.bad, self.seen, self)

    def __str__(self) -> str:
        return ", ".join(f"{kind}: {count}" for kind, count in self.kinds.most_common())
