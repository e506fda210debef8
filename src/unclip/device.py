"""Set up a device, choose the dtype of networks, copy without waiting, check memory, profile."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import profile

from unclip.files import read_text, split_lines

GIB = 2**30
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
    """Return the dtype of networks in sampling: one of `DTYPES`, else raise ValueError.

    "auto" is float16 on a GPU, which all have and whose images differ less from those in float32
    than bfloat16's, and float32 elsewhere.
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


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on a device; None if that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    lines = dict(line.split(":") for line in split_lines(read_text(meminfo)))
    return 1024 * int(lines["MemAvailable"].split()[0])


def check_fits(needs: Mapping[str, int], device: torch.device, *, together: bool) -> None:
    """Raise MemoryError if weights do not fit on a device.

    Args:
        needs: bytes of each stage's weights.
        device: device to load the weights on.
        together: whether all stages are loaded at the same time.
    """
    free = free_memory(device)
    needed = sum(needs.values()) if together else max(needs.values(), default=0)
    if free is None or needed <= free:
        return
    weights = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in needs.items())
    how, fix = ("", ", or offload") if together else (" one at a time", "")
    raise MemoryError(
        f"the weights ({weights}) need {needed / GIB:.1f} GiB{how}, and {free / GIB:.1f} GiB are "
        f"free on {device}: use a smaller dtype (bfloat16){fix}"
    )


@contextmanager
def profiled(path: Path) -> Iterator[None]:
    """Profile the operators inside the context on the CPU and the GPU, and write a report."""
    with profile() as profiler:
        yield
    write_report(profiler, path)


def write_report(profiler: profile, path: Path) -> None:
    """Write a trace for Perfetto or chrome://tracing, and print the most expensive operators."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    operators = profiler.key_averages()
    device = "cuda" if any(one.self_device_time_total for one in operators) else "cpu"
    table = operators.table(f"self_{device}_time_total", row_limit=10)
    print(f"{table}trace: {path}", flush=True)
