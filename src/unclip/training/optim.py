"""Parameter groups, the Muon optimizer and learning-rate schedules.

A schedule is a function `factor(step, max_steps)` in [0, 1].
"""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from unclip.clip.model import BLOCKS as CLIP_BLOCKS
from unclip.training.acceleration import BLOCKS, has_native_bf16
from unclip.training.sharding import full_tensor, local_tensor, shard_like

SYMBOLS = ("embedding", "token", "position", "states")  # parts of the names of learned inputs
STEPS = 5  # of Newton-Schulz
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # Jordan 2024: the steepest quintic at 0 that stays bounded


def parameter_groups(module: nn.Module) -> list[dict]:
    """Group the trainable parameters by role.

    The groups are: matrices and convolutions outside the networks' blocks; without weight decay,
    norms, biases, single vectors, embeddings, positions and the states of a missing caption; and,
    marked "hidden", the matrices and convolutions inside the blocks.
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


def orthogonalize(
    matrices: Float[Tensor, "batch rows columns"],
) -> Float[Tensor, "batch rows columns"]:
    """Replace the singular values of matrices by values near 1 (Newton-Schulz; Jordan 2024).

    Each step maps a singular value s to a·s + b·s³ + c·s⁵. After five steps, the values above about
    a hundredth of the Frobenius norm are in [0.68, 1.21]. The steps run in bfloat16 if the device
    supports it natively. Otherwise, and for float64, they run in the precision of the input, but
    at least in float32: emulated bfloat16 is a hundred times slower than float32.
    """
    rows, columns = matrices.shape[1:]
    x = matrices.mT if rows > columns else matrices
    if x.dtype != torch.float64:
        x = x.bfloat16() if has_native_bf16(x.device.type) else x.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if rows > columns else x).to(matrices.dtype)


class Muon(Optimizer):
    """Muon (Jordan 2024): momentum orthogonalized by Newton-Schulz; AdamW for other parameters.

    Convolutions are flattened to (out, in · height · width). An update is scaled by
    √max(1, rows / columns), so that one learning rate suits all widths. Matrices of the same shape
    are orthogonalized in one batch. With FSDP, each rank gathers and orthogonalizes full updates
    and applies its own shard.

    torch.optim.Muon (2.13) takes only 2-D weights and, as the Muons of timm 1.0 and
    pytorch-optimizer 4.1, computes in bfloat16 everywhere.

    Muon updates the groups with a true "hidden", with `muon_lr` in units of the spectral norm, a
    Nesterov `momentum` and `muon_weight_decay`. The other arguments are those of AdamW.
    """

    def __init__(
        self,
        groups: list[dict],
        *,
        lr: float,
        muon_lr: float,
        momentum: float,
        betas: tuple[float, float],
        weight_decay: float,
        muon_weight_decay: float,
        eps: float = 1e-8,
    ):
        own_settings = {"lr": muon_lr, "momentum": momentum, "weight_decay": muon_weight_decay}
        hidden = [{**group, **own_settings} for group in groups if group.get("hidden")]
        others = [group for group in groups if not group.get("hidden")]
        settings = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        self._adamw = AdamW(others, **settings, fused=True)
        super().__init__([*self._adamw.param_groups, *hidden], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update all parameters that have a gradient, and return the loss of `closure`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Loading a state replaces both, so they are shared again at each step.
        self._adamw.state = self.state
        self._adamw.param_groups = [g for g in self.param_groups if not g.get("hidden")]
        self._adamw.step()
        for group in self.param_groups:
            if group.get("hidden"):
                self._step_hidden(group)
        return loss

    def _step_hidden(self, group: dict) -> None:
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                rows = len(parameter)  # rows of all shards; indexing a DTensor would gather it
                by_shape[rows, parameter.numel() // rows].append(parameter)
        for (rows, columns), parameters in by_shape.items():
            updates = [full_tensor(self._update(p, group["momentum"]), p) for p in parameters]
            matrices = orthogonalize(torch.stack([update.flatten(1) for update in updates]))
            step_size = group["lr"] * math.sqrt(max(1, rows / columns))
            for matrix, parameter in zip(matrices, parameters, strict=True):
                weight, part = local_tensor(parameter), matrix.view(parameter.shape)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(shard_like(part, parameter), alpha=-step_size)

    def _update(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Advance the momentum of a parameter; return this rank's part of the Nesterov update."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        average, gradient = local_tensor(state["momentum"]), local_tensor(parameter.grad)
        average.lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


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
