"""Interleaved timing: contenders in processes of their own take turns, so disturbances hit all."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contender import Contender, Setting, Size, count_parameters, find

FEWEST_ROUNDS = 3
_contender: Contender  # the one that a worker's process times
_memory_before = 0


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Quartiles":
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


class Worker:
    """A process with one contender, its project's allocator settings and its own memory peak."""

    def __init__(self, stage: str, name: str, size: Size, setting: Setting):
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=spawn)
        self.about = self.pool.submit(_build, stage, name, size, setting)

    def seconds(self, measure: str) -> float:
        """Run the measure once and return its duration."""
        return self.pool.submit(_run, measure).result()

    def peak(self) -> int | None:
        """Return the peak of memory in bytes since the last call."""
        return self.pool.submit(_peak).result()


def interleave(
    contenders: Mapping[str, Callable[[], float]], *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Call every contender once per round; each round is begun by another one.

    Args:
        contenders: functions that measure once.
        rounds: largest number of rounds.
        seconds: time after which no round is begun, except the first three.
    """
    names, end = list(contenders), time.perf_counter() + seconds
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(contenders[name]())
    return found


def speed_ratio(seconds: list[float], of_reference: list[float]) -> Quartiles:
    """Return how many times as fast as a reference something is, from the ratios of the rounds.

    A disturbance that is longer than a round slows down both.
    """
    return Quartiles.of([slow / own for own, slow in zip(seconds, of_reference, strict=True)])


def markdown(rows: list[dict[str, Any]]) -> str:
    """Format rows with the same keys as a Markdown table."""
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    padded = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return "" if value is None else str(value)


def _build(stage: str, name: str, size: Size, setting: Setting) -> dict[str, Any]:
    global _contender, _memory_before
    torch.set_num_threads(setting.threads)
    torch.set_float32_matmul_precision("high")
    contender = find(stage, name)
    _memory_before = _resident("VmRSS") or 0  # code only
    _contender = contender(size, setting)
    return {
        "parameters": count_parameters(_contender.modules),
        "measures": _contender.measures,
        "noises": _contender.noises,
    }


def _run(measure: str) -> float:
    started = time.perf_counter()
    getattr(_contender, measure)()
    if _contender.setting.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _peak() -> int | None:
    """Peak of the allocator on a GPU; on a CPU resident memory, on Linux only."""
    if _contender.setting.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    if (peak := _resident("VmHWM")) is None:
        return None
    Path("/proc/self/clear_refs").write_text("5")
    return peak - _memory_before


def _resident(key: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(fields[key].split()[0]) * 1024
