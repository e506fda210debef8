import unclip  # isort: skip (first: it makes torchvision work with a CPU torch)

import signal
from collections.abc import Callable

import pytest
import torch

# A shell that starts the tests in the background makes them and their processes ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # the tensors of the tests are too small for more threads


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The folder of a tiny bundle, which tests only read."""
    import tiny_bundle  # its imports take 2 s

    return tiny_bundle.write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    return unclip.Cascade.load(tiny_folder, device="cpu")


@pytest.fixture
def generators() -> Callable[..., list[torch.Generator]]:
    """Return a function that makes one CPU generator per sample, as samplers take them."""

    def make(count: int, first_seed: int = 0) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(first_seed + k) for k in range(count)]

    return make
