"""Measure a training step of a composed configuration, and choose gradient checkpointing."""

from typing import Any

import torch
from hydra.utils import instantiate
from torch._subclasses.fake_tensor import FakeTensorMode

from unclip import bundle
from unclip.device import GIB
from unclip.stages import Stage, UpsamplerStage
from unclip.training.acceleration import optimize
from unclip.training.cost import StepCost, measure_step
from unclip.training.trainer import resolve_precision

USABLE = 0.9  # share of a device's memory; workspaces and fragmentation are not measured


def measure(config: dict[str, Any], memory: float, clip: dict[str, Any] | None = None) -> StepCost:
    """Measure a training step, and replace gradient_checkpointing=auto in the configuration.

    "auto" enables checkpointing if a step needs more than `USABLE` of the `memory` of a device, in
    GiB. `clip` is the recipe of the frozen CLIP; None leaves it out.
    """
    acceleration = config["acceleration"]
    if acceleration["gradient_checkpointing"] != "auto":
        return _measure(config, clip)
    acceleration["gradient_checkpointing"] = False
    step = _measure(config, clip)
    shards = device_count(config) if config["trainer"]["strategy"] == "fsdp" else 1
    if sum(memory_of(config, step, shards).values()) <= USABLE * memory:
        return step
    acceleration["gradient_checkpointing"] = True
    return _measure(config, clip)


def _measure(config: dict[str, Any], clip: dict[str, Any] | None) -> StepCost:
    trainer = config["trainer"]
    precision = str(resolve_precision(trainer["precision"], trainer["accelerator"]))
    with FakeTensorMode():
        stage = bundle.build(config["model"])
        optimize(stage, **config["acceleration"] | {"compile": False})
        return measure_step(
            stage,
            example_batch(config, stage),
            instantiate(config["optimizer"]),
            bf16=precision.endswith("-mixed"),
            clip=None if clip is None else bundle.build(clip),
            encode_images=not config["precompute_embeddings"],
        )


def device_count(config: dict[str, Any]) -> int:
    """Return the number of devices of a run; "auto" counts those of this machine."""
    devices = config["trainer"]["devices"]
    devices = devices if isinstance(devices, int) else max(torch.cuda.device_count(), 1)
    return devices * config["trainer"].get("num_nodes", 1)


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
    return {name: value / GIB for name, value in memory.items()}
