"""Set up a device for a script, choose the dtype of networks, and copy without waiting."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DTYPES = ("auto", "float32", "bfloat16", "float16")


def set_up_device(*, training: bool = False) -> None:
    """Let a GPU multiply float32 matrices in TF32 and, in training, choose the fastest kernels.

    Every script calls it. cuDNN times its kernels once per shape, which pays off for the few shapes
    of training only.
    """
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = training


@contextmanager
def without_tf32() -> Iterator[None]:
    """Let a GPU compute products and convolutions of float32 in float32 inside the context."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def device_of(accelerator: str) -> str:
    """Return the device type, "cuda" or "cpu", of a trainer with Lightning's accelerator."""
    return "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: str | torch.dtype, device: torch.device | str) -> torch.dtype:
    """Return the dtype of networks in sampling; "auto" is float16 on a GPU, else float32.

    Images sampled in float16 differ less from those in float32 than images sampled in bfloat16, and
    every GPU has fast float16.

    Raises:
        ValueError: the name is not one of `DTYPES`.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it can be {', '.join(DTYPES)}")
    if dtype == "auto":
        dtype = "float16" if torch.device(device).type == "cuda" else "float32"
    return getattr(torch, dtype)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a CPU tensor to a device; a GPU copies from pinned memory while the CPU continues."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
