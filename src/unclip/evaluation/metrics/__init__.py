"""Metrics of the protocol's images: distances, diversity, agreement with the caption."""

from unclip.evaluation.metrics.agreement import ClipScore, RetrievalPrecision
from unclip.evaluation.metrics.distances import Cmmd, Frechet, Kernel
from unclip.evaluation.metrics.diversity import InceptionScore, Manifold

__all__ = [
    "ClipScore",
    "Cmmd",
    "Frechet",
    "InceptionScore",
    "Kernel",
    "Manifold",
    "RetrievalPrecision",
]
