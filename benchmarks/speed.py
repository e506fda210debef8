"""Compare unclip's speed with its peers' at equal parameters: `benchmarks/speed.py [--quick]`.

It prints how many times as fast ours is in each measure, and writes benchmarks/results.json.
"""

import unclip  # isort: skip  # noqa: F401 (first: torchvision then imports next to a CPU torch)

import argparse
import importlib.util
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contender import CONTENDERS, QUICK_SIZES, SIZES, Setting, Size
from timing import Quartiles, Worker, interleave, markdown, speed_ratio

from unclip.evaluation.report import surroundings, write_results
from unclip.training.trainer import resolve_precision

FORMAT = 1
OURS = "unclip"
# (stage, measure) → unit of the rate; training is last, because its memory stays allocated
MEASURES = {
    ("prior", "step"): "embeddings/s",
    ("prior", "sample"): "samples/s",
    ("prior", "train"): "noise samples/s",
    ("decoder", "step"): "images/s",
    ("decoder", "train"): "images/s",
}
TITLES = {
    "step": "one sampling step of a batch",
    "sample": "whole guided sample of one prompt",
    "train": "training step",
}
# (stage, measure) → peer → ratio to reach on two CPU cores, in float32 and in bf16.
# Peers lose time to redundant arithmetic, which bf16 makes cheap: of a sampling step of diffusers'
# prior 87% are matrix products, 4 times as fast in bf16; of ours 63%, and its attention,
# concatenations and casts take as long as in float32. In the decoder's training both run the same
# attention kernel, which bf16 speeds up by 10%: its share of our step grows from 26% to 34%.
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


def main() -> None:
    arguments = parse()
    os.environ["TQDM_DISABLE"] = "1"  # peers show progress bars while they sample
    started = time.perf_counter()
    quick, device = arguments.quick, "cuda" if torch.cuda.is_available() else "cpu"
    precision = resolve_precision(arguments.precision, "gpu" if device == "cuda" else "cpu")
    setting = Setting(device, precision == "bf16-mixed", 2 if quick else 8)
    sizes = {stage: (QUICK_SIZES if quick else SIZES)[stage] for stage in arguments.stages}
    rounds = {"rounds": 2, "seconds": 0.0} if quick else {"rounds": 30, "seconds": arguments.seconds}
    rows: list[Row] = []
    missing: dict[str, str] = {}
    for stage, size in sizes.items():
        rows += measure_stage(stage, size, setting, missing, **rounds)
    for row in rows if device == "cpu" and not quick else ():
        targets = TARGETS.get((row["stage"], row["measure"]), {}).get(row["contender"])
        if targets is not None:
            row["target"] = targets[setting.bf16]
            row["reached"] = row["ratio"] >= row["target"]
    results = {
        "format": FORMAT,
        "benchmark": "speed",
        "quick": quick,
        "machine": {
            "cores": os.cpu_count(),
            **surroundings(torch.device(device)),
            "threads": setting.threads,
            "dtype": "bf16 autocast" if setting.bf16 else "float32",
        },
        "sizes": {stage: vars(size) for stage, size in sizes.items()},
        "sample_steps": setting.sample_steps,
        "rows": rows,
        "not_measured": missing,
        "seconds": round(time.perf_counter() - started, 1),
    }
