"""FSDP2: weights, gradients, averages and optimizer states sharded over all devices.

A stage is unsharded as a whole for validation and export. Other files reach into DTensors only
through the four functions at the end.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from unclip.stages import Stage
from unclip.training.acceleration import BLOCKS  # unsharded one by one; the rest all at once

METHODS = ("encode_context", "loss")  # called instead of forward


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, without tensor parallelism.

    Checkpoints are single files that every other strategy can load. Lightning numbers an
    optimizer's states by the order of the module's parameters; here, as in all other strategies,
    the order of the optimizer's groups counts.
    """

    def __init__(self, timeout: timedelta):
        super().__init__(save_distributed_checkpoint=False, timeout=timeout)

    def setup_environment(self) -> None:
        """Shard over all processes of all nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's full states on rank 0, and nothing on other ranks."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning wraps it
        named = get_optimizer_state_dict(self._module, optimizer, options=options)
        if not named:
            return {}
        numbers = {name: number for number, name in enumerate(self._names(optimizer))}
        return _rekeyed(named, numbers)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let Lightning call `load_optimizer_state_dict`."""
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Open a checkpoint on every rank."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this rank's shards of the weights."""
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self._module, checkpoint["state_dict"], options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's shards of the optimizer states."""
        options = StateDictOptions(full_state_dict=True)
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = _rekeyed(saved, self._names(optimizer))
            set_optimizer_state_dict(self._module, optimizer, named, options=options)

    @property
    def _module(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Return the names of an optimizer's parameters, in the order of its groups."""
        names = {parameter: name for name, parameter in self._module.named_parameters()}
        return [names[p] for group in optimizer.param_groups for p in group["params"]]


def _rekeyed(saved: Mapping[str, Any], keys: Any) -> dict[str, Any]:
    """Replace each parameter's key in an optimizer's state by `keys[key]`."""
    old = saved["param_groups"]
    groups = [{**group, "params": [keys[key] for key in group["params"]]} for group in old]
    return {"state": {keys[key]: s for key, s in saved["state"].items()}, "param_groups": groups}


def blocks_of(stage: Stage) -> Sequence[nn.Module]:
    """Return the parts of a stage that are unsharded one after another; ValueError if none."""
    blocks = [module for module in stage.modules() if isinstance(module, BLOCKS)]
    if not blocks:
        raise ValueError(f"trainer=fsdp cannot shard the stage {stage.name}: use trainer=ddp")
    return blocks


def shard(stage: Stage, mesh: DeviceMesh, *, bf16: bool = False) -> None:
    """Shard a stage, which has the same weights on all ranks, over a one-dimensional mesh.

    With `bf16`, the blocks' weights are gathered in bfloat16, in which they compute under autocast.
    The shards, the sums of gradients, and the weights outside the blocks stay in float32.
    """
    blocks = blocks_of(stage)
    plain = policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if bf16:
        types = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        policy = MixedPrecisionPolicy(**types, cast_forward_inputs=False)
    cast(Any, stage).to(memory_format=torch.contiguous_format)  # FSDP shards no other format
    modules: list[Any] = [*blocks, stage]
    for module in modules:
        fully_shard(module, mesh=mesh, mp_policy=plain if module is stage else policy)
        for name in METHODS:
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)
    # The default order of the backward pass follows the last forward pass, and rank 0 may have
    # sampled a preview that the other ranks have not.
    for module, earlier in zip(modules, [stage, *modules[:-1]], strict=True):
        module.set_modules_to_backward_prefetch([earlier])


def is_sharded(stage: nn.Module) -> bool:
    """Return whether `shard` was applied."""
    return isinstance(stage, FSDPModule)


def unshard(stage: nn.Module) -> None:
    """Give every rank the full weights until `reshard`. All ranks must call it."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()


def reshard(stage: nn.Module) -> None:
    """Leave every rank only its shards."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(module is not stage, recurse=False)
            module.reshard()


@contextmanager
def unsharded(stage: nn.Module) -> Iterator[None]:
    """Give every rank the full weights inside the context. All ranks must enter it."""
    unshard(stage)
    try:
        yield
    finally:
        reshard(stage)


def full_state_dict(stage: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Return a stage's full weights and buffers on the CPU. All ranks must call it.

    A rank that does not `keep` them gets nothing.
    """
    full = ((name, replicate(tensor)) for name, tensor in stage.state_dict().items())
    return {name: tensor.cpu() for name, tensor in full if keep}


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard, sharing memory; a plain tensor is returned detached."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def replicate(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, and a plain tensor as it is. All ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensor(local: Tensor, like: Tensor) -> Tensor:
    """Join all ranks' local tensors, sharded as `like` is. All ranks must call it."""
    if not isinstance(like, DTensor):
        return local
    layout = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(local, like.device_mesh, like.placements, **layout).full_tensor()


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a full tensor, sharded as `like` is, on its device."""
    full = full.to(like.device, like.dtype, copy=True)  # it may be memory-mapped
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements).to_local()
