"""Contenders in processes of their own, timed in turns, so that a busy machine is busy for all.

Each process has its own allocator settings, as its project would have, and its own peak of memory.
"""

import multiprocessing
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from contender import find
from machine import PeakMemory
from setting import DecoderSize, PriorSize, Setting

FEWEST_ROUNDS = 3


class Failed(Exception):
    """What a contender's process said before it ended."""


@dataclass
class Timing:
    """One contender's times of one measure, in seconds, one a round."""

    contender: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


class Worker:
    """A process with one contender in it; it starts at once, and `ready` waits for it."""

    def __init__(self, stage: str, name: str, size: DecoderSize | PriorSize, setting: Setting):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.about: dict[str, Any] = {}
        self._here, there = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(there, stage, name, size, setting), daemon=True
        )
        self._process.start()
        there.close()

    def ready(self) -> None:
        """Waits until the contender is built, and keeps what it says of itself.

        Raises:
            Failed: it could not be built.
        """
        self.about = self._receive()

    def run(self, measure: str) -> float:
        """Does it once; the seconds it took."""
        self._here.send(measure)
        return self._receive()

    def reset_peak(self) -> None:
        """Begins to watch the memory anew."""
        self.run("reset_peak")

    def peak(self) -> int | None:
        """The most memory in bytes since then."""
        return self.run("peak")

    def close(self) -> None:
        """Ends the process."""
        self._here.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> Any:
        try:
            answer = self._here.recv()
        except EOFError:
            raise Failed(f"{self.name} ended without a word: was there memory enough?") from None
        if isinstance(answer, Failed):
            raise answer
        return answer


def interleave(
    workers: Sequence[Worker], measure: str, *, rounds: int, seconds: float
) -> list[Timing]:
    """Each contender's times over the same rounds, each round begun by another.

    Args:
        workers: the contenders that have this measure.
        measure: "train", "step" or "sample".
        rounds: at most.
        seconds: after which no new round is begun, once there were three; 0 for no more than that.
    """
    timings = [Timing(worker.name) for worker in workers]
    for worker in workers:
        worker.reset_peak()
        worker.run(measure)  # warms up, compiles
    end = time.perf_counter() + seconds
    for number in range(rounds):
        if number >= min(FEWEST_ROUNDS, rounds) and time.perf_counter() > end:
            break
        for place in range(len(workers)):
            k = (place + number) % len(workers)
            timings[k].seconds.append(workers[k].run(measure))
    for worker, timing in zip(workers, timings, strict=True):
        timing.peak_bytes = worker.peak()
    return timings


def _serve(
    connection: Connection,
    stage: str,
    name: str,
    size: DecoderSize | PriorSize,
    setting: Setting,
) -> None:
    """The process's own loop: builds the contender, then does what it is told."""
    warnings.simplefilter("ignore", FutureWarning)
    try:
        torch.set_num_threads(setting.threads)
        torch.set_float32_matmul_precision("high")
        contender_class = find(stage, name)
        peak = PeakMemory(setting.device)  # before there is anything but code
        contender = contender_class(size, setting)
        connection.send(
            {
                "parameters": contender.parameters,
                "measures": contender.measures,
                "noises": contender.noises,
            }
        )
        while True:
            measure = connection.recv()
            if measure == "peak":
                connection.send(peak.bytes())
            elif measure == "reset_peak":
                connection.send(peak.reset())
            else:
                connection.send(_timed(getattr(contender, measure), setting.device))
    except EOFError:  # the other side has closed
        pass
    except Exception as error:
        connection.send(Failed(f"{name} failed: {error!r}"))


def _timed(function, device: str) -> float:
    """Seconds of one call: by CUDA's events on a GPU."""
    if device != "cuda":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000
