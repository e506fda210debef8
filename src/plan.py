"""Estimate the cost of a run: `python src/plan.py stage=decoder scale=paper trainer.devices=64`.

It takes every setting of train.py. Nothing is trained or written.
"""

import unclip  # isort: skip # noqa: F401 (first: lets torchvision load next to a CPU torch)

import csv
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from cli import planning
from cli.config_check import check_command_line
from cli.planning import device_count, memory_of
from unclip.files import read_text, split_lines
from unclip.training.cost import StepCost, step_seconds

DEVICES = {1, 8, 64}  # numbers of devices to plan for, besides that of the run


@hydra.main(version_base="1.3", config_path="../conf", config_name="plan")
def main(cfg: DictConfig) -> None:
    """Print the cost of the run that the command line composes."""
    config = _to_dict(cfg)
    for name, value in describe(config, measure(config)).items():
        print(f"{name:41} {value}".rstrip())


def measure(config: dict[str, Any]) -> StepCost:
    """Measure a training step of a composed configuration, with the CLIP of its scale."""
    clip = None
    if config["needs_clip"]:
        overrides = ["stage=clip", f"scale={config['scale']}"]
        clip = _to_dict(hydra.compose("plan", overrides))["model"]
    return planning.measure(config, config["memory"], clip)


def describe(config: dict[str, Any], step: StepCost) -> dict[str, str]:
    """Return the rows of a table: the cost of a step and of the run."""
    trainer, size = config["trainer"], config["data"]["batch_size"]
    acceleration = config["acceleration"]
    devices = device_count(config)
    batches = trainer["accumulate_grad_batches"] * devices  # of a step
    steps = round(trainer["max_steps"] * trainer["max_steps_multiplier"])
    memory = memory_of(config, step, devices if trainer["strategy"] == "fsdp" else 1)
    counts = sorted(DEVICES | {devices})
    flops = {
        "forward": step.forward_flops,
        "forward and backward": step.training_flops,
        "frozen CLIP": step.clip_flops,
    }
    runs = Path(config["folders"]["runs"], config["bundle"], config["stage"])
    rates = {"assumed": config["flops"], **measured_flops(runs)}
    peak = config["peak_flops"]
    rows = {
        f"{config['stage']} at scale {config['scale']}, {trainer['precision']}": "",
        "gradient checkpointing": "on" if acceleration["gradient_checkpointing"] else "off",
        **{f"GFLOPs per sample, {k}": f"{n / size / 1e9:,.1f}" for k, n in flops.items()},
        f"GiB per device, {size} samples": f"{sum(memory.values()):,.2f}",
        **{f"  {name}": f"{value:,.2f}" for name, value in memory.items()},
        "samples": f"{steps * batches * size:,}",
        **{
            f"TFLOP/s per device, {k}": f"{n / 1e12:,.1f} (MFU {n / peak:.1%})"
            for k, n in rates.items()
        },
        f"hours on {', '.join(map(str, counts))} devices": "",
    }
    for strategy in ("ddp", "fsdp"):
        run = {"sharded": strategy == "fsdp", "bf16": trainer["precision"] == "bf16-mixed"}
        run |= {"flops": config["flops"], **config["bandwidth"]}
        seconds = [step_seconds(step, n, batches=batches / n, **run) for n in counts]
        rows[f"  {strategy}"] = "   ".join(f"{steps * value / 3600:,.1f}" for value in seconds)
        total = [sum(memory_of(config, step, n if run["sharded"] else 1).values()) for n in counts]
        rows[f"  {strategy}, GiB per device"] = "   ".join(f"{value:,.1f}" for value in total)
    return rows


def measured_flops(folder: Path) -> dict[str, float]:
    """Return the FLOP/s that the latest run in a folder has logged last, under the run's name."""
    logs = folder.glob("*/logs/metrics.csv")
    for path in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True):
        rows = csv.DictReader(split_lines(read_text(path)))
        logged = [row.get("train/tflops") for row in rows]
        if values := list(filter(None, logged)):
            return {f"measured in {path.parents[1].name}": 1e12 * float(values[-1])}
    return {}


def _to_dict(cfg: DictConfig) -> dict[str, Any]:
    cfg.run_folder = "none"
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


if __name__ == "__main__":
    check_command_line("plan")
    main()
