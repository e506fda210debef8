"""Classifier-free guidance (Ho & Salimans 2022), wrapped around a network."""

from collections.abc import Callable

import torch
from torch import Tensor

Condition = dict[str, Tensor]
ConditionedNetwork = Callable[[Tensor, Tensor], Tensor]


def guided(
    bind: Callable[..., ConditionedNetwork],
    condition: Condition,
    null: Condition,
    scale: float,
    *,
    channels: int | None = None,
) -> ConditionedNetwork:
    """Return `network(x_t, t)` whose output is uncond + scale · (cond - uncond).

    Both halves run in one batch. A half of weight 0 is not computed, such as the null at scale 1.

    Args:
        bind: `bind(**condition)` computes everything that depends only on the condition and
            returns `network(x_t, t)`.
        condition: tensors with one row per sample.
        null: the same tensors without the condition.
        scale: guidance scale.
        channels: number of leading output channels that are guided; the others, a learned
            variance, are taken from the conditional half. None guides all channels.
    """
    if scale in (0, 1):
        return bind(**(condition if scale else null))
    network = bind(**{name: torch.cat([condition[name], null[name]]) for name in condition})

    def guided_network(x_t: Tensor, t: Tensor) -> Tensor:
        cond, uncond = network(torch.cat([x_t, x_t]), torch.cat([t, t])).chunk(2)
        out = scale * cond[:, :channels] + (1 - scale) * uncond[:, :channels]
        return out if channels is None else torch.cat([out, cond[:, channels:]], dim=1)

    return guided_network
