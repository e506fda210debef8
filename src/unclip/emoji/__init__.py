"""Emoji scenes: images rendered from OpenMoji's drawings, with captions and exact object boxes.

This package imports neither the renderer nor webdataset; its modules `render`, `scene_files` and
`emoji_build` do.
"""

from unclip.emoji.catalog import BACKGROUNDS, COLORS, Concept, concepts
from unclip.emoji.labels import LayoutLabels
from unclip.emoji.prompts import Prompt, prompts

__all__ = ["BACKGROUNDS", "COLORS", "Concept", "LayoutLabels", "Prompt", "concepts", "prompts"]
