"""Measure the data loader on generated shards, next to the needs of eight GPUs."""

import unclip  # isort: skip # noqa: F401 (first: torchvision then imports next to a CPU torch)

import argparse
import http.server
import io
import itertools
import multiprocessing
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from results import markdown, write_results

from unclip.data.embeddings import write_embeddings
from unclip.data.loader import ShardDataset, ShardLoader
from unclip.data.prepare.resumable import write_samples
from unclip.data.reader import SampleReader
from unclip.data.remote import list_remote

SHARDS, GPUS = 4, 8 * 300e12
DECODER = {"image_size": 64}
# Size of the stored images, settings of the reader, and GFLOPs per sample by plan.py.
CASES: dict[str, tuple[int, dict[str, Any], float]] = {
    "clip": (256, {"image_size": 256}, 1495),
    "prior, stored embeddings": (256, {"load_image": False}, 2037),
    "decoder": (256, DECODER, 6856),
    "decoder, over HTTP": (256, DECODER, 6856),
    "upsampler_256": (256, {"image_size": 256, "crop": 64, "degradation": "gaussian_blur"}, 1594),
    "upsampler_1024": (1024, {"image_size": 1024, "crop": 256, "degradation": "bsr"}, 3717),
}


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def generate(folder: Path, size: int, images: int) -> None:
    """Write shards of smooth noise as JPEGs, with captions and embeddings."""
    for shard in range(SHARDS):
        path = folder / str(size) / f"{shard:05d}.tar"
        samples = list(_samples(size, images, first=shard * images))
        write_samples(path, samples)
        write_embeddings(path, "clip", [s["__key__"] for s in samples], torch.randn(images, 1024))


def _samples(size: int, images: int, first: int) -> Iterator[dict[str, Any]]:
    for number in range(first, first + images):
        generator, encoded = torch.Generator().manual_seed(number), io.BytesIO()
        noise = torch.randint(256, (size // 8, size // 8, 3), generator=generator)
        small = Image.fromarray(noise.byte().numpy())
        small.resize((size, size), Image.Resampling.BICUBIC).save(encoded, "jpeg", quality=95)
        captions = {"captions": [f"caption {number} of a photograph"]}
        yield {"__key__": f"{number:08d}", "jpg": encoded.getvalue(), "json": captions}


def measure(name: str, folder: Path, seconds: float, url: str = "") -> dict[str, Any]:
    """Load batches for some seconds of CPU time; `url` is that of the folder."""
    torch.set_num_threads(1)
    size, settings, gflops = CASES[name]
    source: Any = folder / str(size)
    if "HTTP" in name:
        source = list_remote(f"{url}/{size}", folder / "cache")
    options = {"batch_size": 16, "shuffle": True, "shuffle_buffer": 100}
    options |= {"embeddings": "clip"} if "embeddings" in name else {}
    loader = ShardLoader(ShardDataset(source, SampleReader(**settings), **options))
    started, wall, count = time.process_time(), time.perf_counter(), 0
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
        count += len(batch["key"])
        if (passed := time.process_time() - started) > seconds:
            break
    row = {"reader": name, "images/s and core": count / passed}
    row["images/s"] = count / (time.perf_counter() - wall)
    row["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    needed = GPUS / gflops / 1e9
    return row | {"images/s of 8 GPUs": needed, "cores": needed / row["images/s and core"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few images, to try everything")
    parser.add_argument("--out", type=Path, default=Path("runs/loader.json"))
    given = parser.parse_args()
    images, seconds = (8, 0.1) if given.quick else (100, 1.0)
    with tempfile.TemporaryDirectory() as name:
        folder, context = Path(name), multiprocessing.get_context("spawn")
        for size in (256, 1024):
            generate(folder, size, images * 256 // size)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=name))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            rows = [pool.submit(measure, case, folder, seconds, url).result() for case in CASES]
    write_results(given.out, "loader", rows=rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
