"""Upsamplers with a pixel-unshuffle front end against the paper's without, at equal training time.

`python benchmarks/patch.py --minutes 5` trains each size twice from the bundle's own recipe, with
its patch and with patch 1 and nothing else changed, in turns on the same crops, and prints PSNR,
SSIM and Fréchet distance on crops that training did not see.
"""

import unclip  # isort: skip  # noqa: F401 (first: torchvision then imports beside a CPU torch)

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from crops import SIDES, Crops
from torch import Tensor

from unclip.bundle import build, read_metadata, stage_file
from unclip.data.loader import ShardLoader
from unclip.data.reader import SampleReader
from unclip.evaluation.pictures import to_float
from unclip.evaluation.report import surroundings, table, write_results
from unclip.stages import UpsamplerStage
from unclip.training.optim import adamw, cosine, parameter_groups
from unclip.training.trainer import keep_freed_memory

FORMAT = 1
STAGES = {"upsampler_256": "gaussian_blur", "upsampler_1024": "bsr"}  # and their degradations
TURN_SECONDS = 10.0
LEARNING_RATE, WARM_UP = 2e-3, 0.05
HERE = Path(__file__).parent


@dataclass
class Contender:
    """An upsampler in training, and how far it has come."""

    patch: int
    stage: UpsamplerStage
    optimizer: torch.optim.Optimizer
    batches: Iterator[dict[str, Tensor]]
    steps: int = 0
    images: int = 0
    seconds: float = 0.0

    @property
    def parameters(self) -> int:
        """How many it has."""
        return sum(parameter.numel() for parameter in self.stage.parameters())

    def train(self, seconds: float, total: float) -> None:
        """Trains for a turn; the learning rate follows the time used of the total."""
        self.stage.train()
        end = min(self.seconds + seconds, total)
        while self.seconds < end:
            batch = next(self.batches)  # reading is another process's work, and not counted
            begin = time.perf_counter()
            part = round(1000 * min(self.seconds / total, 1.0))
            for group in self.optimizer.param_groups:
                group["lr"] = LEARNING_RATE * cosine(
                    part, 1000, warm_up_steps=round(1000 * WARM_UP)
                )
            loss = self.stage.loss(batch)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.stage.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.steps += 1
            self.images += len(batch["image"])
            if loss.is_cuda:
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - begin


def main() -> None:
    """Trains and measures what the command line asks for."""
    keep_freed_memory()
    arguments = parse()
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for name in arguments.stages:
        part = compare(name, arguments)
        rows += part
        print(f"\n{name}, {arguments.minutes:g} minutes each, in turns\n")
        print(table([list(row.values())[1:] for row in part], head=list(part[0])[1:]))
    written = {
        "format": FORMAT,
        "benchmark": "patch",
        "minutes": arguments.minutes,
        "data": str(arguments.data),
        "seed": arguments.seed,
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 1),
        **surroundings(torch.device(arguments.device)),
    }
    print(f"\nresults: {write_results(written, arguments.out)}")


def compare(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for bicubic enlargement and one for each patch."""
    recipe = read_metadata(stage_file(arguments.model, name)).recipe
    own = recipe["network"]["patch"]
    if own == 1:
        raise ValueError(f"{name} of {arguments.model} has patch 1 itself: name another bundle")
    contenders = [contender(name, recipe, patch, arguments) for patch in (own, 1)]
    total = 60 * arguments.minutes
    while any(one.seconds < total for one in contenders):
        for one in contenders:
            one.train(TURN_SECONDS, total)
    crops = Crops(
        arguments.data,
        "test_seen",
        name,
        count=arguments.pictures,
        seeds=range(arguments.seed, arguments.seed + arguments.pictures),
        device=torch.device(arguments.device),
    )
    empty = {"parameters": None, "steps": None, "images": None, "ms_an_evaluation": None}
    rows = [{"stage": name, "front end": "bicubic", **empty, **crops.measure(crops.bicubic())}]
    return rows + [row(name, one, crops) for one in contenders]


def contender(
    name: str, recipe: dict[str, Any], patch: int, arguments: argparse.Namespace
) -> Contender:
    """The recipe's upsampler with another patch, untrained, and its own pass over the crops."""
    recipe = copy.deepcopy(recipe)
    recipe["network"]["patch"] = patch
    torch.manual_seed(arguments.seed)
    stage = build(recipe).to(arguments.device, memory_format=torch.channels_last)
    optimizer = adamw(parameter_groups(stage), lr=LEARNING_RATE)
    batches = training_batches(name, arguments)
    return Contender(patch, stage, optimizer, batches)


def training_batches(name: str, arguments: argparse.Namespace) -> Iterator[dict[str, Tensor]]:
    """Crops of the training pictures with their degraded small versions, without end."""
    size = int(name.rpartition("_")[2])
    reader = SampleReader(
        image_size=size,
        crop=SIDES[name],
        crops_per_image=8,
        degradation=STAGES[name],
        seed=arguments.seed,
    )
    loader = ShardLoader(
        arguments.data / "train" / str(size), reader, batch_size=arguments.batch_size, shuffle=True
    )
    to_device = partial(torch.Tensor.to, device=arguments.device, memory_format=torch.channels_last)
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        for batch in loader:
            yield {key: to_device(to_float(batch[key])) for key in ("image", "low_res")}
        epoch += 1


def row(name: str, one: Contender, crops: Crops) -> dict[str, Any]:
    """What a trained contender is worth."""
    one.stage.eval()
    begin = time.perf_counter()
    images = crops.enlarge(one.stage)
    evaluations = len(crops) * one.stage.sampler.keywords["steps"]
    return {
        "stage": name,
        "front end": f"patch {one.patch}",
        "parameters": one.parameters,
        "steps": one.steps,
        "images": one.images,
        "ms_an_evaluation": 1000 * (time.perf_counter() - begin) / evaluations,
        **crops.measure(images),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/emoji"), help="whose recipes")
    parser.add_argument("--data", type=Path, default=Path("data/emoji_s"))
    parser.add_argument("--stages", nargs="+", choices=[*STAGES], default=[*STAGES])
    parser.add_argument("--minutes", type=float, default=5, help="of training, each of the four")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=200, help="crops that are measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE / "patch.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
