"""Emoji scenes rendered on the fly, as `read_real` returns them."""

import io

import numpy as np
import torch
from PIL import Image

from unclip.emoji.captions import captions
from unclip.emoji.render import scene_png
from unclip.emoji.scene_files import description
from unclip.emoji.scenes import Scene, scenes
from unclip.evaluation.sources import Real


def drawn(split: str, count: int, name: str = "S") -> list[Scene]:
    """Return the first scenes of a split with their twins."""
    return [s for index in range(count) for s in scenes(name, seed=0, split=split, index=index)]


def rendered(shown: list[Scene]) -> Real:
    """Return the images of scenes at 64 px, with their full captions and metadata."""
    images = [Image.open(io.BytesIO(scene_png(scene, 64))).convert("RGB") for scene in shown]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    texts = [captions(scene, seed=0)[0] for scene in shown]
    about = [description(scene, seed=0) for scene in shown]
    return Real(pixels.permute(0, 3, 1, 2).contiguous(), texts, about)
