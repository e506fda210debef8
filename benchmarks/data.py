"""How fast training data is read: `python benchmarks/data.py --data data/emoji_s --clip FILE`.

Each measure takes turns with what it is compared with, so that a disturbance hits both.
"""

import unclip  # isort: skip # noqa: F401 (first: torchvision then imports beside a CPU torch)

import argparse
import io
import itertools
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from unclip.bundle import load_embedder
from unclip.data.embeddings import read_embeddings
from unclip.data.loader import ShardLoader
from unclip.data.reader import SampleReader
from unclip.data.shards import list_shards, open_shards
from unclip.training.embeddings import embed_shard

BATCH = 64


def plain_read(shards: Iterable[Path]) -> Iterator[int]:
    """Every sample's bytes as webdataset groups them; nothing is decoded."""
    for shard in shards:
        with open(shard, "rb") as stream:
            for _ in group_by_keys(tar_file_expander([{"stream": stream, "url": str(shard)}])):
                yield 1


def plain_pictures(shards: Iterable[Path]) -> Iterator[Image.Image]:
    """Pictures alone, in a loop over a tar as short as one can write it."""
    for shard in shards:
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith((".png", ".jpg", ".webp")):
                    content = archive.extractfile(member).read()
                    yield Image.open(io.BytesIO(content)).convert("RGB")


def plain_decode(shards: Iterable[Path]) -> Iterator[int]:
    """One for each picture of that loop."""
    for _ in plain_pictures(shards):
        yield 1


class PlainBatches(IterableDataset):
    """The least that a worker can do: batches of pictures alone, shard after shard, for ever."""

    def __init__(self, shards: list[Path]):
        self.shards = shards

    def __iter__(self) -> Iterator[Tensor]:
        pictures = plain_pictures(itertools.cycle(self.shards))
        while True:
            batch = itertools.islice(pictures, BATCH)
            yield torch.stack([torch.from_numpy(np.array(picture)) for picture in batch])


def plain_worker(shards: list[Path]) -> Iterator[int]:
    """The same, as batches from a worker of PyTorch's DataLoader."""
    for batch in DataLoader(PlainBatches(shards), batch_size=None, num_workers=1):
        yield len(batch)


def loaded(shards: list[Path], **options: object) -> Iterator[int]:
    """Images of an endless loader; the next epoch follows the last."""
    loader = ShardLoader(shards, SampleReader(), batch_size=BATCH, shuffle=True, **options)
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        for batch in loader:
            yield len(batch["key"])


def replayed(shards: list[Path]) -> Iterator[int]:
    """Images that a resumed run leaves out, each in a pass over all but an epoch's last batch."""
    loader = ShardLoader(shards, SampleReader(), batch_size=BATCH, shuffle=True)
    while True:
        loader.load_state_dict({"batches": len(loader) - 1})
        next(iter(loader))
        yield BATCH * (len(loader) - 1)


def rate(images: Iterator[int], seconds: float) -> float:
    """Images a second over some seconds; the iterator keeps its place."""
    started, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        count += next(images)
    return count / passed


def rates(
    contenders: dict[str, Callable[[], Iterator[int]]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Of each contender a rate in every round."""
    running = {name: make() for name, make in contenders.items()}
    for images in running.values():
        next(images)  # workers start
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(rate(running[name], seconds))
    return found


def embedding_rates(shard: Path, clip: Path, rounds: int) -> dict[str, list[float]]:
    """Embeddings a second, computed from a copy of a shard and read back."""
    embedder = load_embedder(clip)
    found: dict[str, list[float]] = {"CLIP embeddings computed": [], "read back": []}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / shard.name
        copy.write_bytes(shard.read_bytes())
        for _ in range(rounds):
            started = time.perf_counter()
            count = embed_shard(embedder, copy, batch_size=BATCH)
            found["CLIP embeddings computed"].append(count / (time.perf_counter() - started))
            started = time.perf_counter()
            rows, table = read_embeddings(copy, embedder.fingerprint)
            torch.stack([table[rows[key]] for key in rows])
            found["read back"].append(count / (time.perf_counter() - started))
    return found


def report(found: dict[str, list[float]], wanted: dict[str, tuple[str, float | None]]) -> Table:
    """Rates and, of some, how many times that of another they are, round by round."""
    table = Table("", "a second", "times", "of", "wanted")
    for name, measured in found.items():
        row = [name, f"{statistics.median(measured):,.0f}"]
        if name in wanted:
            other, least = wanted[name]
            ratios = [a / b for a, b in zip(measured, found[other], strict=True)]
            row += [f"{statistics.median(ratios):.2f}", other, "" if least is None else f"{least}"]
        table.add_row(*row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/emoji_s"))
    parser.add_argument("--clip", type=Path, default=Path("models/emoji/clip.safetensors"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a contender in a round")
    given = parser.parse_args()
    torch.set_num_threads(1)
    shards = list_shards(given.data / "train" / "64")
    contenders = {
        "tar read, nothing decoded": lambda: plain_read(itertools.cycle(shards)),
        "tar read and PIL": lambda: plain_decode(itertools.cycle(shards)),
        "tar read and PIL, one worker": lambda: plain_worker(shards),
        "loader, no worker": lambda: loaded(shards),
        "loader, one worker": lambda: loaded(shards, workers=1),
        "left out when resumed": lambda: replayed(shards),
    }
    found = rates(contenders, given.rounds, given.seconds)
    found |= embedding_rates(shards[0], given.clip, given.rounds)
    wanted = {
        "loader, no worker": ("tar read and PIL", 0.6),
        "loader, one worker": ("tar read and PIL, one worker", 0.6),
        "left out when resumed": ("loader, no worker", None),
        "read back": ("CLIP embeddings computed", 10.0),
    }
    samples = sum(shard.samples for shard in open_shards(shards))
    console = Console(width=100)
    console.print(f"{samples} samples in {len(shards)} shards of {given.data}")
    console.print(report(found, wanted))


if __name__ == "__main__":
    main()
