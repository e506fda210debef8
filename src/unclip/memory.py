"""How much memory weights take, and how much is free."""

from collections.abc import Mapping
from pathlib import Path

import torch

GIB = 2**30


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where that cannot be told."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    table = Path("/proc/meminfo")
    if device.type != "cpu" or not table.exists():
        return None
    lines = dict(line.split(":") for line in table.read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])


def check_fits(needs: Mapping[str, int], device: torch.device, *, together: bool) -> None:
    """Refuses to begin what cannot end well.

    Args:
        needs: bytes by what they are for.
        device: where.
        together: whether all have to be there at the same time.

    Raises:
        MemoryError: with the numbers and what would help.
    """
    free = free_memory(device)
    needed = sum(needs.values()) if together else max(needs.values(), default=0)
    if free is None or needed <= free:
        return
    raise MemoryError(
        f"the weights ({story(needs)}) need {needed / GIB:.1f} GiB"
        f"{'' if together else ' one at a time'}, and {free / GIB:.1f} GiB are free on {device}: "
        "take a smaller dtype (bfloat16)" + (", or offload" if together else "")
    )


def story(needs: Mapping[str, int]) -> str:
    """Bytes in words, by what they are for."""
    return ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in needs.items())
