import unclip  # isort: skip  # noqa: F401 (first: it lets torchvision be imported beside a CPU torch)

import signal

import pytest
import torch

# A shell that starts the tests in the background has them ignore Ctrl-C, and so what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # tests are many small tensors: threads would only wait for each other


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def generators():
    """One CPU generator a sample, as samplers take them."""

    def make(count: int, first_seed: int = 0) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(first_seed + k) for k in range(count)]

    return make
