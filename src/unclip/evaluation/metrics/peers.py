"""How torchmetrics' metrics are used here: on features that are there, repeatably, by one rank."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class Given(nn.Module):
    """Stands for torchmetrics' feature network where the features are there already."""

    def forward(self, features: Tensor) -> Tensor:
        """The features."""
        return features


def made(metric: type[Metric], **settings: Any) -> Metric:
    """A torchmetrics metric without its warning that it keeps features, which lie here anyway."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        return metric(sync_on_compute=False, **settings)  # rank 0 has all features


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generator seeded, and afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
