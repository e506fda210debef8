"""Gradient checkpointing and compilation of any stage; neither changes a weight's name."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from unclip.networks import ARTransformer, PriorTransformer, TextTransformer, UNet
from unclip.networks.causal import Block
from unclip.networks.unet import AttentionBlock, ResBlock
from unclip.stages import Stage

BLOCKS = (ResBlock, AttentionBlock, Block)  # the networks are sequences of these
NETWORKS = (UNet, PriorTransformer, ARTransformer, TextTransformer)


def has_native_bf16(device: str) -> bool:
    """Return whether a device type ("cpu", "cuda") computes in bfloat16 without emulation."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def optimize(
    stage: Stage,
    *,
    compile: bool | Literal["auto"] = False,
    gradient_checkpointing: bool = False,
    sharded: bool = False,
    device: str = "cpu",
) -> None:
    """Compile a stage's networks, or enable gradient checkpointing, in place.

    Only passes with gradients are affected. Their shapes never change, so each network is one
    graph. Validation and sampling, whose batches have many sizes, run without compilation.

    "auto" compiles on the device "cuda", if the stage has a network. The blocks of a sharded stage
    are compiled one by one, as FSDP needs it. Gradient checkpointing keeps only each block's input,
    and recomputes the block in the backward pass.

    Raises:
        ValueError: the stage has no network that can be compiled.
    """
    modules: list[Any] = list(stage.modules())
    networks = [module for module in modules if isinstance(module, NETWORKS)]
    if compile == "auto":
        compile = device == "cuda" and bool(networks)
    if compile and not networks:
        raise ValueError(f"compile: the stage {stage.name} has no network to compile")
    if compile and sharded:
        _compile([module for module in modules if isinstance(module, BLOCKS)])
    for module in modules if gradient_checkpointing else ():
        if isinstance(module, BLOCKS):
            _in_training(module, partial(checkpoint, module.forward, use_reentrant=False))
        elif hasattr(module, "set_grad_checkpointing"):  # open_clip's transformers
            module.set_grad_checkpointing()
    if compile and not sharded:
        _compile(networks)


def _compile(modules: Sequence[nn.Module]) -> None:
    """Compile each module's forward pass; a graph break or a change of shapes is an error."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 2 * len(modules))  # of each class
    for module in modules:
        _in_training(module, torch.compile(module.forward, fullgraph=True, dynamic=False))


def _in_training(module: nn.Module, run: Callable[..., Any]) -> None:
    """Replace a module's forward pass by `run` where gradients are needed."""
    forward = module.forward

    def run_or_forward(*args, **kwargs):
        return (run if torch.is_grad_enabled() else forward)(*args, **kwargs)

    module.forward = run_or_forward
