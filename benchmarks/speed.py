"""Compare unclip's speed with its peers' at equal parameters: `benchmarks/speed.py [--quick]`.

It prints how many times as fast unclip is in each measure, and writes the results after each case.
On a GPU the times are those of CUDA events, and the contenders run one after another.
"""

import unclip  # isort: skip  # noqa: F401 (first: torchvision then imports next to a CPU torch)

import argparse
import importlib.util
import itertools
import os
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from contender import MEASURES, SIZES, Task
from peers import CONTENDERS
from results import device_name, markdown, write_results
from timing import Worker, interleave, quartiles, ratios
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unclip.training.cost import StepMeter, peak_flops
from unclip.training.trainer import resolve_precision

OURS = "unclip"

Row = dict[str, Any]
Seconds = dict[str, list[float]]  # by contender, one per round


def main() -> None:
    arguments = parse()
    # Peers show progress bars while they sample, and use deprecated functions.
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    end = time.monotonic() + 60 * arguments.minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = resolve_precision(arguments.precision, "gpu" if device == "cuda" else "cpu")
    bf16 = precision == "bf16-mixed"
    how = {"device": device, "bf16": bf16, "threads": 2, "compile": arguments.compile}
    peak = peak_flops(torch.device(device), torch.bfloat16 if bf16 else torch.float32)
    print(f"{device_name()}, torch {torch.__version__}, {precision}, {peak / 1e12:.2f} TFLOP/s")
    limits = {"rounds": 30, "seconds": 60.0} if device == "cpu" else {"rounds": 7, "seconds": 3.0}
    limits = {"rounds": 2, "seconds": 0.0} if arguments.quick else limits
    rows: list[Row] = []
    missing: dict[str, str] = {}
    sizes = ["quick"] if arguments.quick else arguments.sizes
    for size, stage in itertools.product(sizes, arguments.stages):
        if stage not in SIZES[size]:
            continue
        if time.monotonic() > end:
            missing[f"{stage}, {size}"] = "the time is over"
            continue
        task, head = Task(**SIZES[size][stage], **how), {"stage": stage, "size": size}
        part = [{**head, **row} for row in compare(stage, task, limits, peak, missing)]
        print(f"\n{markdown(part)}" if part else "", flush=True)
        rows += part
        about = {**how, "peak_flops": peak, "sizes": SIZES, "not_measured": missing}
        write_results(arguments.out, "speed", quick=arguments.quick, rows=rows, **about)
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    print(f"\nresults: {arguments.out}")


def compare(
    stage: str, task: Task, limits: dict[str, Any], peak: float, missing: dict[str, str]
) -> list[Row]:
    """Return a row for each measure and contender; `peak` is the device's FLOP/s."""
    seconds: dict[str, Seconds] = {measure: {} for measure in MEASURES[stage]}
    about: dict[str, Row] = {}
    names = list(CONTENDERS[stage])
    groups = [names] if task.device == "cpu" else [[name] for name in names]  # to fit into memory
    for group in groups:
        workers = start(stage, task, group, missing)
        for measure, found in seconds.items():
            runs = {name: partial(worker.seconds, measure) for name, worker in workers.items()}
            found |= interleave(runs, **limits) if runs else {}
        for name, worker in workers.items():
            about[name] = {"parameters": worker.parameters, "noises": worker.noises}
            about[name] |= {"GiB": worker.peak_gib(), "planned GiB": None}
            worker.shutdown()
    if OURS not in about:
        return []
    flops, about[OURS]["planned GiB"] = planned(stage, task)
    rows = []
    for measure, found in seconds.items():
        part = rows_of(found, about, measure)
        for row in part:
            if measure == "train" and about[row["contender"]]["noises"] == about[OURS]["noises"]:
                row["MFU"] = flops / (row["ms"] / 1000) / peak  # equal networks
        rows += part
    return rows


def planned(stage: str, task: Task) -> tuple[int, float]:
    """Return the FLOPs and the peak GiB of our training step, from fake tensors on a CPU."""
    task = Task(**{**vars(task), "device": "cpu", "compile": False})
    stay = patch.object(
        nn.Module, "to", lambda module, *_, **__: module
    )  # fake weights cannot move
    with FakeTensorMode(), stay:
        ours = CONTENDERS[stage][OURS][1](task)
        weights = list(ours.modules.parameters())
        with StepMeter([*weights, *ours.problem]) as meter:
            ours.train()
    return meter.flops, (meter.peak + sum(weight.nbytes for weight in weights)) / 2**30


def start(stage: str, task: Task, names: list[str], missing: dict[str, str]) -> dict[str, Worker]:
    """Start contenders and warm them up; those that fail are added to `missing`."""
    workers = {}
    for name in names:
        package, build = CONTENDERS[stage][name]
        if importlib.util.find_spec(package) is None:
            missing[name] = f"{package} is not installed: see docs/performance.md"
            continue
        try:
            worker = Worker(build, task)
            for measure in MEASURES[stage]:
                worker.seconds(measure)  # compiles the networks
            workers[name] = worker
        except Exception as error:  # such as too little memory; the others are measured
            missing[f"{name}, {stage}"] = repr(error)
    return workers


def rows_of(seconds: Seconds, about: dict[str, Row], measure: str) -> list[Row]:
    """Return a row per contender with quartiles; `ratio` is how many times as fast ours is.

    In training the ratio compares noised samples per second.
    """
    rows = []
    for name, values in seconds.items():
        noises = about[OURS]["noises"] / about[name]["noises"] if measure == "train" else 1
        row = {"measure": measure, "contender": name, "parameters": about[name]["parameters"]}
        low, median, high = quartiles([1000 * value for value in values])
        row |= {"rounds": len(values), "ms": median, "ms low": low, "ms high": high}
        low, median, high = quartiles([noises * r for r in ratios(values, seconds[OURS])])
        row |= {"ratio": median, "ratio low": low, "ratio high": high, "MFU": None}
        memory = {key: about[name][key] for key in ("GiB", "planned GiB")}
        rows.append(row | (memory if measure == "train" else dict.fromkeys(memory)))
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny networks, to try everything")
    parser.add_argument("--stages", nargs="+", choices=[*MEASURES], default=[*MEASURES])
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES], default=["bench"])
    precisions = ["auto", "32-true", "bf16-mixed"]  # auto: bf16 if the hardware has it
    parser.add_argument("--precision", choices=precisions, default="auto")
    parser.add_argument("--compile", action="store_true", help="compile all contenders")
    about = "no case is begun after this time"
    parser.add_argument("--minutes", type=float, default=30.0, help=about)
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
