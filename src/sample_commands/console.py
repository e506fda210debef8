"""What the commands say while they work, and the device that they work on."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


def say(message: object, file=None) -> None:
    """A line that does not break the progress bar; to stderr unless told otherwise."""
    tqdm.write(str(message), file=file or sys.stderr)


def tell(path: object) -> None:
    """A result: its path, to stdout."""
    say(path, sys.stdout)


@contextmanager
def bar(pictures: str) -> Iterator[Callable[[str, int, int], None]]:
    """Progress over stages × steps: a bar for the stage that runs, gone when all are done."""
    with tqdm(disable=None, leave=False) as shown:

        def progress(stage: str, step: int, steps: int) -> None:
            if step == 1:
                shown.reset(steps)
                shown.set_description(f"{pictures}: {stage}")
            shown.update(step - shown.n)

        yield progress


def device(name: str | None) -> str | None:
    """The device's name, tried.

    Raises:
        ValueError: it cannot be used.
    """
    import torch

    try:
        if name is not None:
            torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name} cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    return name
