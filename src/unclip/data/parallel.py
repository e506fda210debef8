"""Run many small jobs in processes, and hand back each result as it comes."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any


def run_jobs(
    jobs: Iterable[tuple[Callable[..., Any], tuple]], workers: int | None
) -> Iterator[tuple[int, Any]]:
    """Yield (number of the job, what it returned), in the order in which they end.

    Args:
        jobs: functions of a module with their arguments.
        workers: processes; None takes one a core, 0 stays in this process.

    Raises:
        Exception: the first that a job raises; jobs that have not begun are then dropped.
    """
    if workers == 0:
        for number, (function, arguments) in enumerate(jobs):
            yield number, function(*arguments)
        return
    # Spawned, so that no state of this process (threads, locks) reaches the workers.
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        futures = {
            pool.submit(function, *arguments): number
            for number, (function, arguments) in enumerate(jobs)
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
