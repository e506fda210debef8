"""Emoji scenes: pictures drawn from OpenMoji, with captions and the exact objects.

Light to import: `emoji.write` alone needs the renderer and webdataset.
"""

from unclip.emoji.catalogue import BACKGROUNDS, COLORS, Concept, concepts
from unclip.emoji.prompts import Prompt, prompts

__all__ = ["BACKGROUNDS", "COLORS", "Concept", "Prompt", "concepts", "prompts"]
