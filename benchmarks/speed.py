"""Compare unclip's speed with diffusers' at equal parameters: how many times as fast it is.

Contenders take turns, so that a disturbance hits all of them; on a GPU they run one after another,
and the times are those of CUDA events.
"""

import unclip  # isort: skip  # noqa: F401 (first: torchvision then imports next to a CPU torch)

import argparse
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from contender import MEASURES, SIZES, Contender, Task, count_parameters
from peers import CONTENDERS
from results import device_name, markdown, write_results
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unclip.training.cost import StepMeter, peak_flops
from unclip.training.trainer import resolve_precision

OURS = "unclip"
quartiles = partial(statistics.quantiles, n=4, method="inclusive")

_built: list[Contender] = []  # the contender of a worker's process

Row = dict[str, Any]
Seconds = dict[str, list[float]]  # by contender, one per round


def interleave(
    contenders: Mapping[str, Callable[[], float]], *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Call every contender once per round and collect the results; each round begins by another.

    After `seconds` no round is begun, except the first three.
    """
    names, end = list(contenders), time.perf_counter() + seconds
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        if number >= 3 and time.perf_counter() > end:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(contenders[name]())
    return found


class Worker(ProcessPoolExecutor):
    """A process with one contender and the allocator settings of its project."""

    def __init__(self, build: Callable[[Task], Contender], task: Task):
        super().__init__(1, mp_context=multiprocessing.get_context("spawn"))
        self.parameters, self.noises = self.submit(_build, build, task).result()

    def seconds(self, measure: str) -> float:
        """Run a measure once and return its duration."""
        return self.submit(_run, measure).result()


def _build(build: Callable[[Task], Contender], task: Task) -> tuple[int, int]:
    torch.set_num_threads(task.threads)
    torch.set_float32_matmul_precision("high")
    _built.append(build(task))
    return count_parameters(_built[0].modules), _built[0].noises


def _run(measure: str) -> float:
    run = getattr(_built[0], measure)
    if _built[0].task.device != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def main() -> None:
    arguments = parse()
    os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning"  # diffusers uses deprecated functions
    end = time.monotonic() + 60 * arguments.minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = resolve_precision(arguments.precision, "gpu" if device == "cuda" else "cpu")
    bf16 = precision == "bf16-mixed"
    how = {"device": device, "bf16": bf16, "threads": 2, "compile": arguments.compile}
    peak = peak_flops(torch.device(device), torch.bfloat16 if bf16 else torch.float32)
    print(f"{device_name()}, torch {torch.__version__}, {precision}, {peak / 1e12:.2f} TFLOP/s")
    limits = {"rounds": 30, "seconds": 60.0} if device == "cpu" else {"rounds": 7, "seconds": 3.0}
    limits = {"rounds": 2, "seconds": 0.0} if arguments.quick else limits
    rows, missing = [], {}
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
            peak_bytes = worker.submit(torch.cuda.max_memory_allocated).result()  # 0 on a CPU
            about[name] |= {"GiB": peak_bytes / 2**30 or None, "planned GiB": None}
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
    """Return FLOPs and peak GiB of our training step from fake tensors, which cannot move."""
    task = Task(**{**vars(task), "device": "cpu", "compile": False})
    with FakeTensorMode(), patch.object(nn.Module, "to", lambda module, *_, **__: module):
        ours = CONTENDERS[stage][OURS](task)
        weights = list(ours.modules.parameters())
        with StepMeter([*weights, *ours.problem]) as meter:
            ours.train()
    return meter.flops, (meter.peak + sum(weight.nbytes for weight in weights)) / 2**30


def start(stage: str, task: Task, names: list[str], missing: dict[str, str]) -> dict[str, Worker]:
    """Start contenders and warm them up; those that fail are added to `missing`."""
    workers = {}
    for name in names:
        try:
            worker = Worker(CONTENDERS[stage][name], task)
            for measure in MEASURES[stage]:
                worker.seconds(measure)  # compiles the networks
            workers[name] = worker
        except Exception as error:  # such as too little memory; the others are measured
            missing[f"{name}, {stage}"] = repr(error)
    return workers


def rows_of(seconds: Seconds, about: dict[str, Row], measure: str) -> list[Row]:
    """Return a row per contender with quartiles; in training, ratios are of noised samples."""
    rows = []
    for name, values in seconds.items():
        noises = about[OURS]["noises"] / about[name]["noises"] if measure == "train" else 1
        row = {"measure": measure, "contender": name, "parameters": about[name]["parameters"]}
        low, median, high = quartiles([1000 * value for value in values])
        row |= {"rounds": len(values), "ms": median, "ms low": low, "ms high": high}
        # Round by round, because a disturbance that is longer than a round slows down both.
        rounds = zip(values, seconds[OURS], strict=False)
        low, median, high = quartiles([noises * value / ours for value, ours in rounds])
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
    parser.add_argument("--minutes", type=float, default=30.0, help="begin no case after them")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
