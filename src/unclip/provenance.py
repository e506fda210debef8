"""Record what made a result: versions of the code, and metadata in generated images."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from unclip._version import __version__

PACKAGES = ("torch", "torchvision", "lightning", "open_clip_torch", "torchmetrics", "timm")
PACKAGES += ("numpy", "pillow")
# Needed to reproduce an image to the bit, but ignored when metadata is compared: one seed gives one
# image, whatever else is in the batch.
BATCH_KEYS = {"batch", "index"}


def package_versions() -> dict[str, str]:
    """Return the versions of unclip, Python and those of `PACKAGES` that are installed."""
    versions = {"unclip": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def code_version() -> dict[str, str]:
    """Return package versions and, for a clone, "git": its commit, "+changes" if files differ."""
    versions = package_versions()
    if commit := _git("rev-parse", "--short=12", "HEAD"):
        changes = "+changes" if _git("status", "--porcelain", "-uno") else ""
        versions["git"] = commit + changes
    return versions


def run_record() -> dict[str, str]:
    """Return the command of this process and, for a clone, the commit of its code."""
    record = {"command": shlex.join(["python", *sys.argv])}
    commit = code_version().get("git")
    return {**record, "commit": commit} if commit else record


def image_metadata(
    command: str, settings: Mapping[str, Any], fingerprints: Mapping[str, str], **more: Any
) -> dict[str, str]:
    """Return the metadata of a generated image, as text for a PNG.

    Args:
        command: the command that generated it.
        settings: every setting that the image depends on.
        fingerprints: fingerprints of the stages that took part, by stage.
        **more: further keys; values that are not strings are written as JSON.
    """
    values = {"command": command, **more, "settings": settings, "bundle": fingerprints}
    text = {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        for key, value in values.items()
    }
    return {**text, "Software": f"unclip {__version__}"}


def read_image_metadata(path: Path) -> dict[str, str] | None:
    """Return the metadata of a PNG; None if the file is not a readable PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return {key: str(value) for key, value in cast(PngImageFile, image).text.items()}
    except (OSError, ValueError, SyntaxError):
        return None


def is_same_image(first: Mapping[str, str] | None, second: Mapping[str, str] | None) -> bool:
    """Return whether the metadata of two images differ at most in the batch."""
    if first is None or second is None:
        return False
    keys = (first.keys() | second.keys()) - BATCH_KEYS
    return all(first.get(key) == second.get(key) for key in keys)


def _git(*words: str) -> str:
    """Return git's output for the clone of this file; nothing if there is no git or no clone."""
    command = ("git", "-C", str(Path(__file__).parent), *words)
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
