"""Emoji scenes: pictures drawn from OpenMoji, with captions and the exact objects.

Light to import: `emoji.write` alone needs the renderer and webdataset.
"""

from unclip.data.emoji.catalogue import BACKGROUNDS, COLOURS, Concept, concepts
from unclip.data.emoji.prompting import Prompt, prompts

__all__ = ["BACKGROUNDS", "COLOURS", "Concept", "Prompt", "concepts", "prompts"]
