"""Train, run and evaluate a hierarchical text-to-image model (DALL·E 2), and edit with it."""

from typing import TYPE_CHECKING, Any

from unclip import _torchvision as _torchvision  # first: other modules import torchvision
from unclip._version import __version__

if TYPE_CHECKING:
    from unclip.cascade import Cascade

__all__ = ["Cascade", "__version__"]


def __getattr__(name: str) -> Any:
    """Import `Cascade` when it is first used, because it takes 2 s to import its libraries."""
    if name == "Cascade":
        from unclip.cascade import Cascade

        return Cascade
    raise AttributeError(f"module 'unclip' has no attribute {name!r}")
