"""Classifier-free guidance (Ho & Salimans 2022), wrapped around a network."""

from collections.abc import Callable

import torch
from torch import Tensor

Conditioned = Callable[[Tensor, Tensor], Tensor]


def guided(
    prepare: Callable[..., Conditioned],
    condition: dict[str, Tensor],
    null: dict[str, Tensor],
    scale: float,
    *,
    channels: int | None = None,
) -> Conditioned:
    """`network(x_t, t)` with out = uncond + scale · (cond - uncond).

    Both halves run in one batch. At scale 1 the unconditional half is not computed.

    Args:
        prepare: `prepare(**condition)` does what a prompt needs once and returns `network(x_t, t)`.
        condition: tensors, one row a sample.
        null: the same keys for the unconditional half.
        scale: s; 1 is no guidance.
        channels: how many of the output's first channels are guided; the others, a learned
            variance, are the conditional half's. None guides all.
    """
    if scale == 1:
        return prepare(**condition)
    both = prepare(**{name: torch.cat([condition[name], null[name]]) for name in condition})

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        cond, uncond = both(torch.cat([x_t, x_t]), torch.cat([t, t])).chunk(2)
        out = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
        return out if channels is None else torch.cat([out, cond[:, channels:]], dim=1)

    return network
