"""The race's training and sampling, one for both decoders; it needs PyTorch and safetensors."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

Batch = dict[str, Tensor]
Rules = dict[str, Any]


class Racer(NamedTuple):
    """A decoder that takes part in the race."""

    module: nn.Module
    optimizer: Optimizer
    loss: Callable[[Batch], Tensor]
    finish: Callable[[], object]  # called between training and sampling
    sample: Callable[[Batch, range], Tensor]  # uint8 images; one seed per row
    about: dict[str, Any]  # for the results


def race(folder: Path, name: str, rules: Rules, enter: Callable[[Batch], Racer]) -> Rules:
    """Train on train.safetensors; write test's images and a description, which is returned."""
    torch.set_num_threads(1)
    torch.manual_seed(rules["seed"])
    train, test = (load_file(folder / f"{split}.safetensors") for split in ("train", "test"))
    since = time.process_time()
    racer = enter(train)

    def loss(rows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=rules["bf16"]):
            return racer.loss(batch_of(train, rows))

    trained = train_for(rules, loss, racer.optimizer, rows=len(train["image"]), since=since)
    racer.module.eval()
    racer.finish()
    since, images = time.process_time(), []
    for rows in torch.arange(len(test["text_mask"])).split(25):  # a batch
        seeds = range(rows[0].item(), rows[-1].item() + 1)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=rules["bf16"]):
            images.append(racer.sample(batch_of(test, rows), seeds))
    about = {"parameters": sum(parameter.numel() for parameter in racer.module.parameters())}
    about |= {**trained, **racer.about, "sampling_cpu_seconds": time.process_time() - since}
    save_file({"image": torch.cat(images).contiguous()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(about))
    return about


def batch_of(data: Batch, rows: Tensor) -> Batch:
    """Return some rows; text states and embeddings become float32."""
    batch = {name: tensor[rows] for name, tensor in data.items()}
    return {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}


def train_for(
    rules: Rules, loss: Callable[[Tensor], Tensor], optimizer: Optimizer, *, rows: int, since: float
) -> dict[str, float]:
    """Train for the rules' CPU seconds, leave the averaged weights, and return statistics.

    The learning rates rise linearly, then fall to zero along half a cosine of the CPU time.
    Gradients are clipped to a norm of 1. The EMA's update t decays by at most (1 + t) / (10 + t).
    `loss` takes the indices of a batch's rows, and `since` is `time.process_time()` at the start.
    """
    batch_size, warm_up_steps = rules["batch_size"], max(rules["warm_up_steps"], 1)
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    averages = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(rules["seed"])
    batches: list[Tensor] = []
    losses: list[float] = []
    progress = 0.0
    while not losses or progress < 1:
        if not batches:
            order = torch.randperm(rows, generator=generator)
            batches = list(order[: max(rows // batch_size, 1) * batch_size].split(batch_size))
        warm_up = min(1, (len(losses) + 1) / warm_up_steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * warm_up * (1 + math.cos(math.pi * progress)) / 2
        value = loss(batches.pop())
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(value.item())
        with torch.no_grad():
            decay = min(rules["ema_decay"], (1 + len(losses)) / (10 + len(losses)))
            torch._foreach_lerp_(averages, parameters, 1 - decay)
        progress = min((time.process_time() - since) / rules["seconds"], 1.0)
    with torch.no_grad():
        torch._foreach_copy_(parameters, averages)
    cpu_seconds, last = time.process_time() - since, losses[-100:]  # the loss is their mean
    return {"steps": len(losses), "cpu_seconds": cpu_seconds, "loss": sum(last) / len(last)}
