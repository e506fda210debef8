"""What a measurement ran on, and how much memory a process needed at most."""

import os
import platform
from pathlib import Path
from typing import Any

import torch
from setting import Setting

from unclip.evaluation.report import surroundings


def describe(setting: Setting) -> dict[str, Any]:
    """CPU, cores, memory, versions and how the networks ran, as plain values."""
    return {
        "cpu": _processor(),
        "cores": _cores(),
        "memory_gib": round(_memory() / 2**30, 1),
        "system": platform.platform(),
        **surroundings(torch.device(setting.device)),
        "threads": setting.threads,
        "dtype": {"32-true": "float32", "bf16-mixed": "bf16 autocast"}[setting.precision],
        "compiled": setting.compile,
    }


def two_cores(setting: Setting) -> bool:
    """Whether this is the kind of machine that the targets were set for."""
    return setting.device == "cpu" and setting.threads == 2


class PeakMemory:
    """The most memory that this process has held since `reset`, beyond what it held when made.

    On a GPU, of the allocator; on a CPU, resident (on Linux alone: elsewhere None).
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._before = None if device == "cuda" else _status("VmRSS")

    def reset(self) -> None:
        """Forget what was needed until now."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif self._before is not None:
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int | None:
        """The peak."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return None if self._before is None else _status("VmHWM") - self._before


def _status(key: str) -> int | None:
    """A size from /proc/self/status in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields[key].split()[0]) * 1024


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
