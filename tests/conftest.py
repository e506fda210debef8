import unclip  # isort: skip  # noqa: F401 (first: it lets torchvision be imported beside a CPU torch)

import pytest
import torch

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
