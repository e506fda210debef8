"""Time against memory, and compilation, for any stage: neither changes a weight's name."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from unclip.networks import UNet
from unclip.networks.causal import Block
from unclip.networks.unet import AttentionBlock, ResBlock
from unclip.stages import Stage

BLOCKS = (ResBlock, AttentionBlock, Block)  # what networks are a sequence of
COMPILED = (UNet, Block)  # of a transformer the block: all of its blocks share one compilation


def has_native_bf16(device: str) -> bool:
    """Tell whether a device type ("cpu", "cuda") computes in bfloat16 without emulating it."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def accelerate(
    stage: Stage, *, compile: bool = False, gradient_checkpointing: bool = False
) -> None:
    """Prepares a stage's networks in place.

    Args:
        stage: about to be trained.
        compile: torch.compile, in place.
        gradient_checkpointing: each block keeps its input alone and is computed again in the
            backward pass.

    Raises:
        ValueError: the stage has nothing that could be compiled.
    """
    if gradient_checkpointing:
        recompute(stage)
    if compile:
        parts = [module for module in stage.modules() if isinstance(module, COMPILED)]
        if not parts:
            raise ValueError(f"compile: the stage {stage.name} has no network that is compiled")
        for part in parts:
            part.compile()


def recompute(stage: nn.Module) -> None:
    """Lets each block keep its input alone and be computed again in the backward pass; in place."""
    for module in stage.modules():
        if isinstance(module, BLOCKS):
            module.forward = _again(module.forward)
        elif hasattr(module, "set_grad_checkpointing"):  # open_clip's
            module.set_grad_checkpointing()


def _again(forward):
    def run(*inputs, **named):
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, use_reentrant=False, **named)

    return run
