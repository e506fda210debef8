"""What made a picture, kept in its PNG text, so that it can be made again."""

import hashlib
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

# What is told of a picture's company: needed for its last bit, but no difference to look at.
_COMPANY = ("batch", "place")


def story(
    cascade, command: str, used: Iterable[str], settings: Mapping[str, Any], **more: Any
) -> dict[str, str]:
    """The PNG text of a picture.

    Args:
        cascade: what made it.
        command: by which command.
        used: the stages that took part.
        settings: all that it depends on beside the bundle.
        **more: further keys; what is not a string is written as JSON.
    """
    import unclip

    fingerprints = {name: cascade.metadata[name].fingerprint for name in dict.fromkeys(used)}
    told = {"command": command, **more, "settings": dict(settings), "bundle": fingerprints}
    if (dtype := str(cascade.dtype).removeprefix("torch.")) != "float32":
        told["dtype"] = dtype
    plain = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in told.items()
    }
    return {**plain, "Software": f"unclip {unclip.__version__}"}


def write(image: Image.Image, folder: Path, name: str, about: Mapping[str, str]) -> Path:
    """Writes a PNG with its story as text: over one with the same story, else under a free name."""
    path = free(folder, name, ".png", lambda path: _same(read(path), about))
    text = PngImagePlugin.PngInfo()
    for key, value in about.items():
        text.add_itxt(key, value)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        image.save(unfinished, format="PNG", pnginfo=text)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def free(folder: Path, name: str, suffix: str, same: Callable[[Path], bool]) -> Path:
    """The first of NAME, NAME-2, … that nothing else has; `same` tells what may be written over."""
    for number in itertools.count(1):
        path = folder / (f"{name}{suffix}" if number == 1 else f"{name}-{number}{suffix}")
        if not path.exists() or same(path):
            return path


def _same(written: Mapping[str, str] | None, about: Mapping[str, str]) -> bool:
    if written is None:
        return False
    left_out = dict.fromkeys(_COMPANY)
    return {k: v for k, v in written.items() if k not in left_out} == {
        k: v for k, v in about.items() if k not in left_out
    }


def read(path: Path) -> dict[str, str] | None:
    """A PNG's text; None for what is no PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            return {key: str(value) for key, value in image.text.items()}
    except (OSError, AttributeError, ValueError, SyntaxError):
        return None


def file_hash(path: Path) -> str:
    """The sha256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def slug(prompt: str) -> str:
    """A prompt as a file name: lower-case letters, digits and hyphens, at most 60."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    return "-".join(re.findall("[a-z0-9]+", plain))[:60].rstrip("-") or "picture"
