"""Open the bundle of a sample.py command, show its progress and write its images."""

import json
import re
import unicodedata
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from cli.sample import COMMANDS, log
from unclip.cascade import Cascade
from unclip.device import profiled, set_up_device
from unclip.files import atomic_write
from unclip.images import save_png
from unclip.provenance import is_same_image, read_image_metadata
from unclip.sampling_run import Progress
from unclip.text_to_image import STAGE_OF_SIZE

GIF_MILLISECONDS = 120  # per frame


@contextmanager
def progress_bar(label: str, args: Namespace | None = None) -> Iterator[Progress]:
    """Yield a cascade's callback that shows a bar per stage; profile if `args` say so."""
    trace = profiled(args.out / "profile.json.gz") if args and args.profile else nullcontext()
    with tqdm(disable=None, leave=False) as bar, trace:

        def progress(stage: str, step: int, steps: int) -> None:
            if step == 1:
                bar.reset(steps)
                bar.set_description(f"{label}: {stage}")
            bar.update(step - bar.n)

        yield progress


def open_cascade(args: Namespace) -> Cascade:
    """Open the bundle of a command; set `args.dtype`, and a missing `args.size` to the largest."""
    set_up_device()
    try:
        if args.device is not None:
            torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {args.device} cannot be used here: {reason}") from error
    cascade = Cascade.load(args.model, device=args.device, dtype=args.dtype, offload=args.offload)
    args.dtype = str(cascade.dtype).removeprefix("torch.")
    if args.size is None:
        args.size = cascade.size
        if args.size < max(STAGE_OF_SIZE):
            log(f"the largest images that {cascade.folder} makes have {args.size} pixels")
    return cascade


def slug(text: str) -> str:
    """Return a text as a file name: lower-case letters, digits and hyphens, at most 60."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return "-".join(re.findall("[a-z0-9]+", plain))[:60].rstrip("-") or "image"


def read_command(path: Path) -> dict[str, str]:
    """Return the metadata of an image that a command made; other images raise ValueError."""
    metadata = read_image_metadata(path) or {}
    if not {"command", "settings", "bundle"} <= metadata.keys():
        raise ValueError(f"{path.name} has no settings: use a PNG of sample.py or of the page")
    if metadata["command"] not in COMMANDS or "index" not in metadata:
        raise ValueError(f"{path.name} is a contact sheet or an image of Look inside: use another")
    return metadata


def write_png(image: Image.Image, folder: Path, name: str, metadata: Mapping[str, str]) -> Path:
    """Write a PNG with its metadata and return its path.

    The file replaces one with the metadata of the same image; otherwise it gets a free name.
    """

    def same(path: Path) -> bool:
        return is_same_image(read_image_metadata(path), metadata)

    return save_png(image, free_path(folder, name, ".png", same), metadata)


def write_gif(
    frames: Sequence[Image.Image], folder: Path, name: str, metadata: Mapping[str, str]
) -> Path:
    """Write an endless animation, forward and backward, and return its path.

    Each frame has its own palette. Names are chosen as in `write_png`.
    """
    comment = json.dumps(metadata)
    path = free_path(folder, name, ".gif", lambda path: _gif_comment(path) == comment)
    frames = [*frames, *frames[-2:0:-1]]
    shown = [frame.quantize(256, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    with atomic_write(path) as temporary:
        shown[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=shown[1:],
            duration=GIF_MILLISECONDS,
            loop=0,
            comment=comment.encode(),
        )
    return path


def _gif_comment(path: Path) -> str | None:
    """Return a GIF's comment; None if it has none or cannot be read."""
    try:
        with Image.open(path, formats=["GIF"]) as image:
            return image.info["comment"].decode()
    except (OSError, KeyError, ValueError, SyntaxError):
        return None


def free_path(folder: Path, name: str, suffix: str, same: Callable[[Path], bool]) -> Path:
    """Return the first of NAME, NAME-2, … that does not exist or may be replaced."""
    path, number = folder / f"{name}{suffix}", 1
    while path.exists() and not same(path):
        number += 1
        path = folder / f"{name}-{number}{suffix}"
    return path
