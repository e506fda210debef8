"""unclip: train, run, edit with and measure a hierarchical text-to-image model (DALL·E 2)."""

from typing import Any

from unclip import _torchvision as _torchvision  # first: what comes after imports torchvision
from unclip._version import __version__

__all__ = ["Cascade", "__version__"]


def __getattr__(name: str) -> Any:
    """Loads `Cascade` when it is first asked for, since it brings CLIP and its libraries."""
    if name == "Cascade":
        from unclip.cascade import Cascade

        return Cascade
    raise AttributeError(f"module 'unclip' has no attribute {name!r}")
