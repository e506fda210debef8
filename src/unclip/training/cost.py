"""Measure the cost of a training step on fake tensors: nothing is computed or allocated.

FakeTensorMode gives each operation the shapes, dtypes and kernels that it has on a CPU, such as
fused attention. `MemTracker` of torch.distributed is not used: it rejects modules that run twice in
a step, such as the blocks of the priors.

The peaks of real steps on a CPU, profiled at emoji scale in float32 and bf16, agree within 0.4%. On
fake CUDA tensors, autograd saves 3% to 6% less than this peak in bf16 (decoder at karlo scale, the
paper's upsampler_256). Workspaces of kernels and fragmentation are not included.
"""

import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

from unclip import bundle
from unclip.batch import Batch
from unclip.clip import encode_text
from unclip.stages import ClipStage, Stage
from unclip.training.optim import parameter_groups

aten = torch.ops.aten

ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
FLOPS = {  # torch's own registry knows only the attention kernels of CUDA
    **flop_registry,
    ATTENTION: shape_wrapper(lambda *shapes, **_: sdpa_flop_count(*shapes[:3])),
    BACKWARD: shape_wrapper(lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])),
}


class StepCost(NamedTuple):
    """FLOPs of one training step over the batch, and bytes on one device."""

    forward_flops: int
    training_flops: int  # of the forward and backward passes
    clip_flops: int  # of the frozen CLIP
    weights: int  # with buffers
    gradients: int
    optimizer: int
    clip: int
    activations: int  # on top of weights and gradients, at the peak of the step


def measure_step(
    stage: Stage,
    batch: Batch,
    optimizer: Callable[[list[dict]], Optimizer],
    *,
    bf16: bool = False,
    clip: ClipStage | None = None,
    encode_images: bool = False,
) -> StepCost:
    """Measure a training step of a stage that was built under FakeTensorMode, inside that mode.

    `batch` has fake tensors. With `bf16`, the forward pass runs under autocast. The frozen `clip`
    encodes the captions in each step, and the images with `encode_images`.
    """
    states = [*stage.parameters(), *stage.buffers()]
    stage.train()
    with StepMeter([*states, *batch.values()]) as meter:
        # As in Lightning, the last step's gradients live until the loss has been computed.
        gradients = [torch.empty_like(p) for p in stage.parameters() if p.requires_grad]
        gradient_bytes = meter.now
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = _loss(stage, batch)
        forward_flops = meter.flops
        del gradients
        loss.backward()
    with torch.no_grad(), StepMeter([]) as clip_meter:
        if clip is not None:
            _encode(clip, batch, images=encode_images)
    stepped = optimizer(parameter_groups(stage))
    stepped.step()
    return StepCost(
        forward_flops,
        meter.flops,
        clip_meter.flops,
        weights=_bytes(states),
        gradients=gradient_bytes,
        optimizer=_bytes(value for state in stepped.state.values() for value in state.values()),
        clip=_bytes(() if clip is None else [*clip.parameters(), *clip.buffers()]),
        activations=meter.peak - gradient_bytes,
    )


def step_seconds(
    step: StepCost,
    devices: int,
    *,
    batches: float,
    sharded: bool,
    bf16: bool,
    flops: float,
    node: float,
    network: float,
) -> float:
    """Estimate the seconds of an optimizer step; communication overlaps with computation.

    DDP reduces the gradients during the last backward pass of a step. FSDP (`sharded`) gathers the
    weights, in bfloat16 with `bf16`, in every forward and backward pass, and reduces the gradients
    in every backward pass. Gradients are reduced in float32.

    A device computes `flops` per second and accumulates `batches` per step. Up to 8 devices are one
    node, and a ring of them transfers `node` bytes per second; over several nodes, `network`.
    """
    forward = (step.forward_flops + step.clip_flops) / flops
    backward = (step.training_flops - step.forward_flops) / flops
    per_byte = (devices - 1) / devices / (node if devices <= 8 else network)
    gather, reduce = per_byte * step.weights / (1 + bf16), per_byte * step.gradients
    if sharded:
        return batches * (max(forward, gather) + max(backward, gather + reduce))
    return batches * (forward + backward) + max(2 * reduce - backward, 0.0)


def forward_flops(recipe: dict[str, Any], batch: Mapping[str, Any]) -> int:
    """Count the FLOPs of a stage's loss over a batch, without computing it."""
    with FakeTensorMode(), torch.no_grad(), StepMeter([]) as meter:
        stage = bundle.build(recipe)
        fake: Any = dict(batch)
        for name, value in batch.items():
            if torch.is_tensor(value):
                fake[name] = torch.empty(value.shape, dtype=value.dtype)
        _loss(stage, fake)
    return meter.flops


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(size, size, generator=generator, device=device).to(dtype)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


class StepMeter(TorchDispatchMode):
    """Count `flops`, and the bytes of the fake tensors allocated inside: alive `now`, and `peak`.

    Tensors `outside` are not counted. FlopCounterMode is not used: its hooks keep recomputed
    activations alive. Indexing with a mask, whose result has an unknown size, returns one element.
    """

    def __init__(self, outside: Iterable[Any]):
        super().__init__()
        self.flops = self.now = self.peak = 0
        tensors = filter(torch.is_tensor, outside)
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation and count its FLOPs and outputs."""
        kwargs = kwargs or {}
        if func is aten.index.Tensor and args[1][0].dtype == torch.bool:
            out = args[0].new_empty((1, *args[0].shape[args[1][0].ndim :]))
        else:
            out = func(*args, **kwargs)
        if (count := FLOPS.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _loss(stage: Stage, batch: Batch) -> Tensor:
    """Return the loss; for CLIP, whose own loss depends on the tokens' values, a simpler one."""
    if isinstance(stage, ClipStage):
        image, text = _encode(stage, batch)
        return (image @ text.mT).mean()
    return stage.loss(batch)["loss"]


def _encode(clip: ClipStage, batch: Batch, *, images: bool = True) -> list[Tensor]:
    """Return embeddings of as many images and captions as a batch has."""
    count, size, model = len(batch["caption"]), clip.image_size, clip.model
    image = [model.encode_image(torch.empty(count, 3, size, size))] if images else []
    tokens = torch.zeros(count, model.context_length, dtype=torch.int64)
    return [*image, encode_text(model, tokens).text_embedding]


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.nbytes for value in values if torch.is_tensor(value))
