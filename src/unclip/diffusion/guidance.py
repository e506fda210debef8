"""Classifier-free guidance (Ho & Salimans 2022), wrapped around a network."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Condition = dict[str, Tensor]
ConditionedNetwork = Callable[[Tensor, Tensor], Tensor]


def guided(
    bind: Callable[..., ConditionedNetwork],
    branches: Sequence[tuple[float, Condition]],
    *,
    channels: int | None = None,
) -> ConditionedNetwork:
    """Return `network(x_t, t)` whose output is a weighted sum over several conditions.

    With scale s the branches are (s, condition) and (1 - s, null), so that out = uncond +
    s · (cond - uncond). All branches run in one batch; branches of weight 0 are not run, such as
    the null at scale 1.

    Args:
        bind: `bind(**condition)` computes everything that depends only on the condition and
            returns `network(x_t, t)`.
        branches: weight and condition (tensors with one row per sample) of each branch, the full
            condition first.
        channels: number of leading output channels that are guided; the others, a learned
            variance, are taken from the first branch. None guides all.
    """
    branches = [(weight, condition) for weight, condition in branches if weight != 0]
    if len(branches) == 1:
        return bind(**branches[0][1])
    names = branches[0][1]
    joined = {name: torch.cat([condition[name] for _, condition in branches]) for name in names}
    network = bind(**joined)
    weights = [weight for weight, _ in branches]

    def weighted_sum(x_t: Tensor, t: Tensor) -> Tensor:
        copies = len(weights)
        outputs = network(torch.cat([x_t] * copies), torch.cat([t] * copies)).chunk(copies)
        means = [output if channels is None else output[:, :channels] for output in outputs]
        parts = [weight * mean for weight, mean in zip(weights, means, strict=True)]
        out = functools.reduce(torch.add, parts)
        return out if channels is None else torch.cat([out, outputs[0][:, channels:]], dim=1)

    return weighted_sum
