"""torchmetrics' image metrics on features that are already computed, repeatably, on one rank."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class IdentityFeatures(nn.Module):
    """A feature network for torchmetrics that returns its input."""

    def forward(self, features: Tensor) -> Tensor:
        """Return the features."""
        return features


def build_metric(metric: type[Metric], **settings: Any) -> Metric:
    """Build a torchmetrics metric on features, without its warning that it keeps them all."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features.*")
        return metric(feature=IdentityFeatures(), sync_on_compute=False, **settings)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generator, and restore it on exit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
