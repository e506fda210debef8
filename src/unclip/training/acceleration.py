"""Gradient checkpointing and compilation of any stage; neither changes a weight's name."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unclip.networks import UNet
from unclip.networks.causal import Block
from unclip.networks.unet import AttentionBlock, ResBlock
from unclip.stages import Stage

BLOCKS = (ResBlock, AttentionBlock, Block)  # the networks are sequences of these
COMPILED = (UNet, Block)  # all blocks of a transformer share one compilation


def has_native_bf16(device: str) -> bool:
    """Return whether a device type ("cpu", "cuda") computes in bfloat16 without emulation."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def optimize(stage: Stage, *, compile: bool = False, gradient_checkpointing: bool = False) -> None:
    """Compile a stage's networks, or enable gradient checkpointing, in place.

    Args:
        stage: stage to be trained.
        compile: apply torch.compile.
        gradient_checkpointing: keep only each block's input, and recompute the block in the
            backward pass.

    Raises:
        ValueError: the stage has no network that can be compiled.
    """
    modules: list[Any] = list(stage.modules())
    for module in modules if gradient_checkpointing else ():
        if isinstance(module, BLOCKS):
            module.forward = _checkpointed(module.forward)
        elif hasattr(module, "set_grad_checkpointing"):  # open_clip's transformers
            module.set_grad_checkpointing()
    if compile:
        parts = [module for module in modules if isinstance(module, COMPILED)]
        if not parts:
            raise ValueError(f"compile: the stage {stage.name} has no network to compile")
        for part in parts:
            part.compile()


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
