"""Compare the data loader's speed with a minimal loop over tar files: `benchmarks/data.py`."""

import unclip  # isort: skip # noqa: F401 (first: torchvision then imports next to a CPU torch)

import argparse
import io
import itertools
import tarfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from results import markdown
from timing import interleave, quartiles, ratios

from unclip.data.loader import ShardDataset, ShardLoader
from unclip.data.reader import SampleReader
from unclip.data.shards import list_shards

BATCH = 64
TARGET = 0.6  # of the loop's speed: the loader shuffles, reads captions and checks samples


def loop(shards: list[Path]) -> Iterator[int]:
    """Decode the images of the shards in order, without end; yield 1 for each."""
    for shard in itertools.cycle(shards):
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith((".png", ".jpg", ".webp")):
                    Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB")
                    yield 1


def loader(shards: list[Path], *, workers: int = 0) -> Iterator[int]:
    """Load batches without end; yield the number of images in each."""
    dataset = ShardDataset(shards, SampleReader(), batch_size=BATCH, shuffle=True)
    loader = ShardLoader(dataset, workers=workers)
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for batch in loader:
            yield len(batch["key"])


def images_per_second(counts: Iterator[int], seconds: float) -> float:
    """Read for some time and return the rate; the iterator keeps its place."""
    started, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        count += next(counts)
    return count / passed


def compare(shards: list[Path], *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return a row per reader; its ratio to the loop is taken round by round."""
    readers = {"loop": loop(shards), "loader": loader(shards)}
    readers["loader, one worker"] = loader(shards, workers=1)
    for counts in readers.values():
        next(counts)  # starts the worker
    runs = {name: partial(images_per_second, counts, seconds) for name, counts in readers.items()}
    rates = interleave(runs, rounds=rounds, seconds=float("inf"))
    rows = []
    for name, values in rates.items():
        ratio = quartiles(ratios(values, rates["loop"]))[1]
        row = {"reader": name, "images/s": quartiles(values)[1], "ratio": ratio}
        rows.append({**row, "target": None if name == "loop" else TARGET})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/emoji_s"))
    parser.add_argument("--seconds", type=float, default=2.0, help="time of a reader in a round")
    given = parser.parse_args()
    shards = list_shards(given.data / "train" / "64")
    print(markdown(compare(shards, rounds=7, seconds=given.seconds)))


if __name__ == "__main__":
    main()
