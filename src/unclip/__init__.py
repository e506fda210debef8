"""unclip: train, run, edit with and measure a hierarchical text-to-image model (DALL·E 2)."""

from unclip import _torchvision as _torchvision

__version__ = "0.1.0"
