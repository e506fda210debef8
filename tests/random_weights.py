"""Random weights, so that every parameter of a small module matters."""

from typing import TypeVar

import torch

M = TypeVar("M", bound=torch.nn.Module)


def randomize(module: M, std: float) -> M:
    """Fill all parameters with normal noise and return the module in eval mode."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module.eval()


def without_gradient(module: torch.nn.Module) -> list[str]:
    """Return the names of the parameters that the backward pass did not reach."""
    return [name for name, parameter in module.named_parameters() if parameter.grad is None]
