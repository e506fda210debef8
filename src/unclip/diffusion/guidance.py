"""Classifier-free guidance (Ho & Salimans 2022), wrapped around a network."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Condition = dict[str, Tensor]
Conditioned = Callable[[Tensor, Tensor], Tensor]


def guided(
    prepare: Callable[..., Conditioned],
    branches: Sequence[tuple[float, Condition]],
    *,
    channels: int | None = None,
    rescale: float = 0.0,
) -> Conditioned:
    """`network(x_t, t)` whose output is a weighted sum of its outputs under several conditions.

    With scale s the branches are (s, condition) and (1 - s, null), so that out = uncond +
    s · (cond - uncond). All run in one batch; those of weight 0 are not run, such as the null at
    scale 1.

    Args:
        prepare: `prepare(**condition)` does what a prompt needs once and returns `network(x_t, t)`.
        branches: weight and condition (tensors, one row a sample), the fullest condition first.
        channels: how many of the output's first channels are guided; the others, a learned
            variance, are the first branch's. None guides all.
        rescale: how far, from 0 to 1, the output's standard deviation is brought back to that of
            the first branch (Lin et al. 2024, eq. 15-16).
    """
    branches = [(weight, condition) for weight, condition in branches if weight != 0]
    if len(branches) == 1:
        return prepare(**branches[0][1])
    names = branches[0][1]
    joined = {name: torch.cat([condition[name] for _, condition in branches]) for name in names}
    network = prepare(**joined)
    weights = [weight for weight, _ in branches]

    def sum_of_branches(x_t: Tensor, t: Tensor) -> Tensor:
        times = len(weights)
        outputs = network(torch.cat([x_t] * times), torch.cat([t] * times)).chunk(times)
        means = [output if channels is None else output[:, :channels] for output in outputs]
        out = sum(weight * mean for weight, mean in zip(weights, means, strict=True))
        if rescale:
            out = out * (1 - rescale + rescale * _deviation(means[0]) / _deviation(out))
        return out if channels is None else torch.cat([out, outputs[0][:, channels:]], dim=1)

    return sum_of_branches


def _deviation(output: Tensor) -> Tensor:
    return output.std(dim=tuple(range(1, output.ndim)), keepdim=True)


def within(interval: tuple[float, float], guided: Conditioned, plain: Conditioned) -> Conditioned:
    """`guided` at timesteps within `interval`, both ends included, and `plain` at all others.

    Guidance is harmful at high noise and useless at low (Kynkäänniemi et al. 2024), and costs an
    evaluation more a step.
    """
    low, high = interval

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        return (guided if low <= int(t[0]) <= high else plain)(x_t, t)

    return network
