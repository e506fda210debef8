"""Estimate the cost of a run: `python src/plan.py stage=decoder scale=paper trainer.devices=64`.

It takes every setting of train.py. Nothing is trained or written.
"""

import unclip  # isort: skip # noqa: F401 (first: lets torchvision load next to a CPU torch)

import csv
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode

from cli.config_check import check_command_line
from unclip import bundle
from unclip.files import read_text, split_lines
from unclip.stages import Stage, UpsamplerStage
from unclip.training.acceleration import optimize
from unclip.training.cost import StepCost, measure_step, step_seconds

DEVICES = {1, 8, 64}  # numbers of devices to plan for, besides that of the run


@hydra.main(version_base="1.3", config_path="../conf", config_name="plan")
def main(cfg: DictConfig) -> None:
    """Print the cost of the run that the command line composes."""
    config = _to_dict(cfg)
    for name, value in describe(config, measure(config)).items():
        print(f"{name:41} {value}".rstrip())


def measure(config: dict[str, Any]) -> StepCost:
    """Measure a training step of a composed configuration."""
    with FakeTensorMode():
        stage, clip = bundle.build(config["model"]), None
        optimize(stage, **config["acceleration"] | {"compile": False})
        if config["needs_clip"]:
            overrides = ["stage=clip", f"scale={config['scale']}"]
            clip = bundle.build(_to_dict(hydra.compose("plan", overrides))["model"])
        optimizer = hydra.utils.instantiate(config["optimizer"])
        settings = {
            "bf16": config["trainer"]["precision"] == "bf16-mixed",
            "encode_images": not config["precompute_embeddings"],
        }
        return measure_step(stage, example_batch(config, stage), optimizer, clip=clip, **settings)


def example_batch(config: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """Make an empty batch of the shapes that a stage trains on."""
    clip, data = config["clip"], config["data"]
    size, length, dim = data["batch_size"], clip["context_length"], clip["embedding_dim"]
    side = data.get("crop") or data.get("image_size") or clip["image_size"]
    batch = {
        "key": [str(index) for index in range(size)],
        "caption": ["a caption"] * size,
        "image": torch.empty(size, 3, side, side),
        "image_embedding": torch.empty(size, dim),
        "tokens": torch.empty(size, length, dtype=torch.int64),
        "text_states": torch.empty(size, length, clip["text_width"]),
        "text_mask": torch.empty(size, length, dtype=torch.bool),
        "text_embedding": torch.empty(size, dim),
    }
    if isinstance(stage, UpsamplerStage):
        batch["low_res"] = torch.empty(size, 3, side // stage.scale, side // stage.scale)
    return batch


def describe(config: dict[str, Any], step: StepCost) -> dict[str, str]:
    """Return the rows of a table: the cost of a step and of the run."""
    trainer, size = config["trainer"], config["data"]["batch_size"]
    devices = trainer["devices"] if isinstance(trainer["devices"], int) else 1
    devices *= trainer.get("num_nodes", 1)
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


def memory_of(config: dict[str, Any], step: StepCost, shards: int) -> dict[str, float]:
    """Return the memory of a device in GiB, by its use."""
    states = {
        "weights": step.weights,
        "gradients": step.gradients,
        "optimizer state": step.optimizer,
        "EMA weights": step.gradients if "ema" in config["callbacks"] else 0,
    }
    memory = {name: value / shards for name, value in states.items()}
    memory |= {"frozen CLIP": step.clip, "activations": step.activations}
    return {name: value / 2**30 for name, value in memory.items()}


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
