"""Weights, gradients, averages and optimizer states in shards over all devices (FSDP2).

A stage is gathered as a whole where it is looked at: in validation and when it is exported.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from unclip.stages import Stage
from unclip.training.acceleration import BLOCKS as SHARDED  # gathered one by one; the rest at once

METHODS = ("project", "read", "loss")  # that are called in place of forward


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, without tensor parallelism.

    Checkpoints are single files that any other strategy reads, too. Lightning's own number an
    optimizer's states by the order of the module's parameters; here, as everywhere else, it is that
    of the optimizer's groups.
    """

    def __init__(self, **settings):
        super().__init__(save_distributed_checkpoint=False, **settings)

    def setup_environment(self) -> None:
        """Shards over all processes, whatever node they are on."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's states, whole, on rank 0; nothing on the others."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning wraps it
        named = get_optimizer_state_dict(self.model, optimizer, options=options)
        if not named:
            return {}
        number = {name: place for place, name in enumerate(self._names(optimizer))}
        return _rekeyed(named, number)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Has `load_optimizer_state_dict` called."""
        return True

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Opens a checkpoint on every rank; what is not asked for is not read."""
        return torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes this rank's shards of the weights."""
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes this rank's shards of the optimizers' states."""
        options = StateDictOptions(full_state_dict=True)
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = _rekeyed(saved, self._names(optimizer))
            set_optimizer_state_dict(self.model, optimizer, named, options=options)

    def _names(self, optimizer: Optimizer) -> list[str]:
        """The names of an optimizer's parameters, in the order of its groups."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [names[p] for group in optimizer.param_groups for p in group["params"]]


def _rekeyed(saved: Mapping[str, Any], keys: Any) -> dict[str, Any]:
    """An optimizer's state with `keys[old]` for each parameter's old key."""
    groups = [
        {**group, "params": [keys[old] for old in group["params"]]}
        for group in saved["param_groups"]
    ]
    return {"state": {keys[old]: s for old, s in saved["state"].items()}, "param_groups": groups}


def blocks_of(stage: Stage) -> list[nn.Module]:
    """The parts of a stage that are gathered one after another.

    Raises:
        ValueError: it has none, as a CLIP.
    """
    blocks = [module for module in stage.modules() if isinstance(module, SHARDED)]
    if not blocks:
        raise ValueError(f"trainer=fsdp cannot shard the stage {stage.name}: take trainer=ddp")
    return blocks


def shard(stage: Stage, mesh: DeviceMesh) -> None:
    """Shards a stage in place.

    Args:
        stage: with the same weights on all ranks.
        mesh: of one dimension.

    Raises:
        ValueError: it has no blocks.
    """
    blocks = blocks_of(stage)
    stage.to(memory_format=torch.contiguous_format)  # FSDP shards nothing else
    for module in (*blocks, stage):
        fully_shard(module, mesh=mesh)
        for name in METHODS:
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)
    # Left alone, the way back follows what ran last, and rank 0 may have drawn a preview.
    for module, earlier in zip((*blocks, stage), (stage, *blocks), strict=True):
        module.set_modules_to_backward_prefetch([earlier])


def is_sharded(stage: nn.Module) -> bool:
    """Whether `shard` was here."""
    return isinstance(stage, FSDPModule)


def gather(stage: nn.Module) -> None:
    """Gives every rank whole weights, which stay until `scatter`. For all ranks at once."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()


def scatter(stage: nn.Module) -> None:
    """Leaves every rank its shards alone."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(module is not stage, recurse=False)
            module.reshard()


@contextmanager
def gathered(stage: nn.Module) -> Iterator[None]:
    """Whole weights inside. For all ranks at once."""
    gather(stage)
    try:
        yield
    finally:
        scatter(stage)


def whole_state(stage: nn.Module) -> dict[str, Tensor]:
    """All of a stage's weights and buffers, whole and on the CPU. For all ranks at once."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
        for name, tensor in stage.state_dict().items()
    }


def own(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing memory with it; of a plain one all."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a plain tensor that is to be sharded as another is."""
    whole = whole.to(like.device, like.dtype)
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements).to_local()


def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which each rank has a part. For all ranks at once."""
    if not isinstance(like, DTensor):
        return part
    layout = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(part, like.device_mesh, like.placements, **layout).full_tensor()
