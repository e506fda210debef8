"""Profile training and sampling with torch's profiler."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile

OPERATORS = 10


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
    table = operators.table(f"self_{device}_time_total", OPERATORS)
    print(f"{table}trace: {path}", flush=True)
