"""The race's training loop, one for all contenders; it needs nothing but PyTorch."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer


class Training(NamedTuple):
    """How a contender was trained.

    Attributes:
        steps: optimizer steps.
        cpu_seconds: CPU time of the process, what was fitted before the first step included.
        loss: mean of the last 100 steps.
    """

    steps: int
    cpu_seconds: float
    loss: float


def train_for(
    rules: Mapping[str, Any],
    loss: Callable[[Tensor], Tensor],
    optimizer: Optimizer,
    *,
    rows: int,
    since: float | None = None,
) -> Training:
    """Train for a CPU time and leave the averaged weights in the parameters.

    The learning rates rise linearly, then fall to zero along half a cosine of the CPU time.
    Gradients are clipped to a norm of 1. The EMA's update t decays by at most (1 + t) / (10 + t).

    Args:
        rules: "seconds", CPU time of this process, in which at least one step is made;
            "batch_size"; "warm_up_steps"; "ema_decay".
        loss: loss of a batch, given the indices of its rows.
        optimizer: optimizer of all parameters that are trained.
        rows: number of training images.
        since: `time.process_time()` at the start; None is now.
    """
    batch_size, warm_up_steps = rules["batch_size"], rules["warm_up_steps"]
    since = time.process_time() if since is None else since
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    averages = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    batches: list[Tensor] = []
    losses: list[float] = []
    step, progress = 0, 0.0
    while step == 0 or progress < 1:
        if not batches:
            order = torch.randperm(rows, generator=generator)
            batches = list(order[: max(rows // batch_size, 1) * batch_size].split(batch_size))
        factor = min(1, (step + 1) / max(warm_up_steps, 1)) * (1 + math.cos(math.pi * progress)) / 2
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        value = loss(batches.pop())
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        losses.append(value.item())
        with torch.no_grad():
            decay = min(rules["ema_decay"], (1 + step) / (10 + step))
            torch._foreach_lerp_(averages, parameters, 1 - decay)
        progress = min((time.process_time() - since) / rules["seconds"], 1.0)
    with torch.no_grad():
        torch._foreach_copy_(parameters, averages)
    last = losses[-100:]
    return Training(step, time.process_time() - since, sum(last) / len(last))
