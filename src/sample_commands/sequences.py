"""A sequence of pictures as one file."""

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sample_commands.story import free

MILLISECONDS = 120  # a frame


def write_gif(frames: Sequence[Image.Image], folder: Path, name: str, comment: str) -> Path:
    """An animation, there and back without end, with colors of its own in each frame.

    Over one with the same comment, else under a free name.
    """
    path = free(folder, name, ".gif", lambda path: _comment(path) == comment)
    turned = [*frames, *frames[-2:0:-1]]
    shown = [frame.quantize(256, dither=Image.Dither.FLOYDSTEINBERG) for frame in turned]
    unfinished = path.with_name(f".{path.name}.part")
    try:
        shown[0].save(
            unfinished,
            format="GIF",
            save_all=True,
            append_images=shown[1:],
            duration=MILLISECONDS,
            loop=0,
            comment=comment.encode(),
        )
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _comment(path: Path) -> str | None:
    """A GIF's comment; None where there is none to be read."""
    try:
        with Image.open(path, formats=["GIF"]) as image:
            return image.info["comment"].decode()
    except (OSError, KeyError, ValueError, SyntaxError):
        return None
