"""Gradient checkpointing and compilation of any stage; neither changes a weight's name."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
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
    if gradient_checkpointing:
        enable_gradient_checkpointing(stage)
    if compile:
        parts = [module for module in stage.modules() if isinstance(module, COMPILED)]
        if not parts:
            raise ValueError(f"compile: the stage {stage.name} has no network to compile")
        for part in parts:
            part.compile()


def enable_gradient_checkpointing(stage: nn.Module) -> None:
    """Recompute each block in the backward pass instead of keeping its activations; in place."""
    for module in stage.modules():
        if isinstance(module, BLOCKS):
            module.forward = _checkpointed(module.forward)
        elif hasattr(module, "set_grad_checkpointing"):  # open_clip's transformers
            module.set_grad_checkpointing()


def _checkpointed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
