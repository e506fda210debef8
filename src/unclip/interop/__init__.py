"""Karlo's public weights and diffusers' folders, both ways."""

from unclip.interop.diffusers import convert_to_diffusers
from unclip.interop.karlo import STAGES, convert_karlo

__all__ = ["STAGES", "convert_karlo", "convert_to_diffusers"]
