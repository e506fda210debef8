"""Compare the memory that weights need with the memory that is free."""

from collections.abc import Mapping
from pathlib import Path

import torch

from unclip.files import read_text, split_lines

GIB = 2**30


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
    raise MemoryError(
        f"the weights ({format_bytes(needs)}) need {needed / GIB:.1f} GiB"
        f"{'' if together else ' one at a time'}, and {free / GIB:.1f} GiB are free on {device}: "
        "use a smaller dtype (bfloat16)" + (", or offload" if together else "")
    )


def format_bytes(needs: Mapping[str, int]) -> str:
    """Format a {name: bytes} mapping as text."""
    return ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in needs.items())
