"""Muon for hidden matrices and convolutions, AdamW for all other parameters, in one optimizer."""

from collections import defaultdict
from collections.abc import Callable
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from unclip.training.acceleration import has_native_bf16
from unclip.training.sharding import full_tensor, local_tensor, shard_like

STEPS = 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # Jordan 2024: the steepest quintic at 0 that stays bounded


def orthogonalize(
    matrices: Float[Tensor, "batch rows columns"], steps: int = STEPS
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
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if rows > columns else x).to(matrices.dtype)


class Muon(Optimizer):
    """Muon (Jordan 2024): momentum orthogonalized by Newton-Schulz; AdamW for other parameters.

    Convolutions are flattened to (out, in · height · width). An update is scaled by
    √max(1, rows / columns), so that one learning rate suits all widths. Matrices of the same shape
    are orthogonalized in one batch. With FSDP, each rank gathers and orthogonalizes full updates
    and applies its own shard.

    torch.optim.Muon (2.13) takes only 2-D weights and computes in bfloat16 everywhere. Those of
    timm 1.0 and pytorch-optimizer 4.1 take convolutions but also fix bfloat16, and replace the
    fused AdamW by an implementation of their own; muon-optimizer 0.1 requires a process group for
    its distributed form, and heavyball 3.2 rounds at random.

    Args:
        groups: parameter groups; Muon updates those with a true "hidden", AdamW the others.
        lr: learning rate of AdamW.
        muon_lr: learning rate of Muon, in units of the spectral norm.
        momentum: Nesterov momentum of Muon.
        betas: decay rates of AdamW's moments.
        weight_decay: decoupled weight decay of AdamW.
        muon_weight_decay: decoupled weight decay of Muon.
        eps: added to the denominator of AdamW.
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
            step_size = group["lr"] * sqrt(max(1, rows / columns))
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
