"""Parameter groups, the gradient norm and learning-rate schedules.

A schedule is a function `factor(step, max_steps)` in [0, 1].
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from unclip.clip.model import BLOCKS as CLIP_BLOCKS
from unclip.training.acceleration import BLOCKS
from unclip.training.sharding import replicate

SYMBOLS = ("embedding", "token", "position", "states")  # parts of the names of learned inputs


def parameter_groups(module: nn.Module) -> list[dict]:
    """Group the trainable parameters by role.

    The first group contains the matrices and convolutions outside the networks' blocks: input,
    output and conditioning layers. The second, without weight decay, contains norms, biases, single
    vectors, embeddings, positions and the states of a missing caption. The third, marked "hidden",
    contains the matrices and convolutions inside the blocks.
    """
    blocks = [part for part in module.modules() if isinstance(part, (*BLOCKS, *CLIP_BLOCKS))]
    inside = {part for block in blocks for part in block.modules()}
    outer, plain, hidden = [], [], []
    seen: set[nn.Parameter] = set()  # shared parameters are optimized once
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            vector = sum(size > 1 for size in parameter.shape) < 2
            symbol = isinstance(owner, nn.Embedding) or any(word in name for word in SYMBOLS)
            matrices = hidden if owner in inside else outer
            (plain if vector or symbol else matrices).append(parameter)
    groups = [
        {"params": outer},
        {"params": plain, "weight_decay": 0.0},
        {"params": hidden, "hidden": True},
    ]
    return [group for group in groups if group["params"]]


def _warm_up(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / steps) if steps > 0 else 1.0


def cosine(step: int, max_steps: int, *, warm_up_steps: int = 0, final: float = 0.0) -> float:
    """Warm up linearly, then follow half a cosine down to `final` at `max_steps`."""
    progress = (step - warm_up_steps) / max(max_steps - warm_up_steps, 1)
    progress = min(max(progress, 0.0), 1.0)
    return _warm_up(step, warm_up_steps) * (
        final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    )


def warmup_stable_decay(
    step: int, max_steps: int, *, warm_up_steps: int = 0, decay_steps: int = 0
) -> float:
    """Warm up linearly, stay at 1, then decay as 1 - √progress in the last `decay_steps` steps.

    This shape of the decay is the best of those compared by Hägele et al. 2024.
    """
    progress = max(step - (max_steps - decay_steps), 0) / max(decay_steps, 1)
    decay = 1 - math.sqrt(min(progress, 1.0)) if decay_steps > 0 else 1.0
    return _warm_up(step, warm_up_steps) * decay


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients, a scalar; of sharded gradients, over all ranks."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return replicate(torch.nn.utils.get_total_norm(gradients))
