"""Compare unclip's speed with its peers' at equal parameters: `benchmarks/speed.py [--quick]`.

It prints how many times as fast unclip is in each measure, and writes runs/bench.json.
"""

import unclip  # isort: skip  # noqa: F401 (first: torchvision then imports next to a CPU torch)

import argparse
import importlib.util
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contender import MEASURES, QUICK_SIZES, SIZES, Task
from peers import CONTENDERS
from results import device_name, markdown, write_results
from timing import Worker, interleave, quartiles, ratios

from unclip.training.trainer import resolve_precision

OURS = "unclip"
# (stage, measure) → peer → ratio to reach on two CPU cores, in float32 and in bf16.
# bf16 makes arithmetic cheap, and most of unclip's advantage is arithmetic that it does not do.
# Matrix products, which bf16 makes 4 times as fast, are 87% of a sampling step of diffusers' prior
# and 63% of ours; our other operations (attention, casts, copies) take as long as in float32. In
# the decoder's training both run the same attention kernel, which bf16 makes only 11% faster: its
# share of our step grows from 26% to 34%.
TARGETS = {
    ("prior", "step"): {"diffusers": (8.0, 5.0)},
    ("prior", "train"): {"diffusers": (3.5, 3.5)},
    ("decoder", "step"): {"diffusers, channels_last": (1.05, 1.05), "DALLE2-pytorch": (2.0, 2.0)},
    ("decoder", "train"): {
        "diffusers": (1.05, 1.0),
        "GLIDE": (1.1, 1.1),
        "DALLE2-pytorch": (1.5, 1.5),
    },
}

Row = dict[str, Any]
Seconds = dict[str, list[float]]  # by contender, one per round
Workers = dict[str, Worker]


def main() -> None:
    arguments = parse()
    # Peers show progress bars while they sample, and use deprecated functions.
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    quick, device = arguments.quick, "cuda" if torch.cuda.is_available() else "cpu"
    precision = resolve_precision(arguments.precision, "gpu" if device == "cuda" else "cpu")
    how = {"device": device, "bf16": precision == "bf16-mixed", "threads": 2}
    print(f"{device_name()}, torch {torch.__version__}, {precision}")
    sizes = QUICK_SIZES if quick else SIZES
    limits = {"rounds": 2, "seconds": 0.0} if quick else {"rounds": 30, "seconds": 60.0}
    rows: list[Row] = []
    missing: dict[str, str] = {}
    for stage in arguments.stages:
        task = Task(**sizes[stage], **how)
        workers = start(stage, task, missing)
        for measure in MEASURES[stage]:
            runs = {name: partial(worker.seconds, measure) for name, worker in workers.items()}
            targets = TARGETS.get((stage, measure), {}) if device == "cpu" and not quick else {}
            targets = {name: pair[task.bf16] for name, pair in targets.items()}
            part = rows_of(interleave(runs, **limits), workers, measure, targets)
            print(f"\n{stage}, {measure}\n\n{markdown(part)}", flush=True)
            rows += [{"stage": stage, "measure": measure, **row} for row in part]
        for worker in workers.values():
            worker.shutdown()
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    results = {"quick": quick, **how, "sizes": sizes, "rows": rows, "not_measured": missing}
    write_results(arguments.out, "speed", **results)
    print(f"\nresults: {arguments.out}")


def start(stage: str, task: Task, missing: dict[str, str]) -> Workers:
    """Start the contenders and warm them up; peers that fail are added to `missing`."""
    workers = {}
    for name, (package, build) in CONTENDERS[stage].items():
        if importlib.util.find_spec(package) is None:
            missing[name] = f"{package} is not installed: see benchmarks/README.md"
            continue
        try:
            worker = Worker(build, task)
            for measure in MEASURES[stage]:
                worker.seconds(measure)  # compiles the networks on a GPU
            workers[name] = worker
        except Exception as error:  # the others are measured without this peer
            if name == OURS:
                raise
            missing[name] = repr(error)
    return workers


def rows_of(seconds: Seconds, workers: Workers, measure: str, targets: dict) -> list[Row]:
    """Return a row per contender with quartiles; `ratio` is how many times as fast ours is.

    In training the ratio compares noised samples per second.
    """
    rows = []
    for name, values in seconds.items():
        noises = workers[OURS].noises / workers[name].noises if measure == "train" else 1
        row = {"contender": name, "parameters": workers[name].parameters, "rounds": len(values)}
        low, median, high = quartiles([1000 * value for value in values])
        row |= {"ms": median, "ms low": low, "ms high": high}
        low, median, high = quartiles([noises * r for r in ratios(values, seconds[OURS])])
        row |= {"ratio": median, "ratio low": low, "ratio high": high, "target": targets.get(name)}
        rows.append(row | {"reached": row["target"] and row["ratio"] >= row["target"]})
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny networks, to try everything")
    parser.add_argument("--stages", nargs="+", choices=[*SIZES], default=[*SIZES])
    precisions = ["auto", "32-true", "bf16-mixed"]  # auto: bf16 if the hardware has it
    parser.add_argument("--precision", choices=precisions, default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
