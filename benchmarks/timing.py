"""Interleaved timing: contenders take turns, so that a disturbance hits all of them."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor

import torch
from contender import Contender, Task, count_parameters

_built: list[Contender] = []  # the contender of a worker's process


def interleave(
    contenders: Mapping[str, Callable[[], float]], *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Call every contender once per round and collect the results; each round begins by another.

    At most `rounds` are made; after `seconds` no round is begun, except the first three.
    """
    names, end = list(contenders), time.perf_counter() + seconds
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        if number >= 3 and time.perf_counter() > end:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(contenders[name]())
    return found


def quartiles(values: list[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def ratios(values: list[float], others: list[float]) -> list[float]:
    """Divide round by round: a disturbance that is longer than a round slows down both."""
    return [value / other for value, other in zip(values, others, strict=False)]


class Worker(ProcessPoolExecutor):
    """A process with one contender and the allocator settings of its project."""

    def __init__(self, build: Callable[[Task], Contender], task: Task):
        super().__init__(1, mp_context=multiprocessing.get_context("spawn"))
        self.parameters, self.noises = self.submit(_build, build, task).result()

    def seconds(self, measure: str) -> float:
        """Run a measure once and return its duration."""
        return self.submit(_run, measure).result()

    def peak_gib(self) -> float | None:
        """Return the peak memory so far on a GPU."""
        return self.submit(_peak_gib).result()


def _build(build: Callable[[Task], Contender], task: Task) -> tuple[int, int]:
    torch.set_num_threads(task.threads)
    torch.set_float32_matmul_precision("high")
    _built.append(build(task))
    return count_parameters(_built[0].modules), _built[0].noises


def _run(measure: str) -> float:
    run = getattr(_built[0], measure)
    if _built[0].task.device != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _peak_gib() -> float | None:
    cuda = _built[0].task.device == "cuda"
    return torch.cuda.max_memory_allocated() / 2**30 if cuda else None
