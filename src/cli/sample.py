"""Parse the commands of sample.py, without importing torch, so that `--help` is quick."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from cli import SHIPPED, Parser
from cli.ranges import SEEDS, number

Add = Callable[..., Any]  # `add_argument` of a command's parser

positive, finite, fraction = number(int, 1), number(float), number(float, 0, 1)


def log(message: object, file: TextIO | None = None) -> None:
    """Print a line without breaking the progress bar, to stderr by default."""
    tqdm.write(str(message), file=file or sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with a subparser for each of `COMMANDS`."""
    parser = Parser(
        prog="sample.py",
        description="Generate and edit images with a trained bundle.",
        epilog="The word text may be left out. Each command has its own --help.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (add_arguments, about, example) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"For example:\n\n    python src/sample.py {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_arguments(command.add_argument)
    return parser


def _text(add: Add) -> None:
    about = "description of an image"
    add("prompts", nargs="*", type=prompt, metavar="prompt", help=about)
    add("--prompts", dest="prompts_file", type=Path, metavar="FILE", help="file: a prompt per line")
    add("--count", type=positive, default=1, help="number of images per prompt")
    about = "keep only the N images of each prompt that CLIP ranks highest; also set --count"
    add("--keep", type=positive, metavar="N", help=about)
    add("--stages", action="store_true", help="also write the smaller sizes and a contact sheet")
    priors = ("diffusion", "ar", "linear", "none")
    about = "method that predicts image embeddings; none uses text embeddings instead"
    add("--prior", choices=priors, default="diffusion", help=about)
    add("--prior-guidance", type=finite, metavar="F", help="guidance scale of the prior; 1 is none")
    _sampling(add, batch_size=8)


def _vary(add: Add) -> None:
    _editing(add)
    add("--count", type=positive, default=4, help="number of images")
    add("--eta", type=fraction, default=0.5, help="0 reconstructs; 1 varies most")


def _interpolate(add: Add) -> None:
    _editing(add, images="+")
    add("--frames", type=positive, default=9, help="frames from each image to the next")
    add("--weights", type=finite, nargs="+", help="make one mixture, with a weight for each image")
    about = "slerp interpolates the noise latent as well; fixed samples one by the seed"
    add("--noise", choices=("slerp", "fixed"), default="slerp", help=about)


def _edit(add: Add) -> None:
    _editing(add)
    about = "description of the image; optional"
    add("--from", dest="source", default="", metavar="TEXT", help=about)
    add("--to", dest="target", required=True, metavar="TEXT", help="description of the result")
    add("--strength", type=finite, default=0.5, help="largest angle of the edit, often 0.25 to 0.5")
    add("--frames", type=positive, default=6, help="number of images, of increasing strength")


def _inpaint(add: Add) -> None:
    _editing(add)
    add("prompt", nargs="?", help="description of the whole result; default: as the image")
    add("--mask", type=Path, help="image that is white where to paint")
    add("--margin", type=finite, help="paint around the image instead; a fraction of its side")
    add("--count", type=positive, default=1, help="number of images")


def _again(add: Add) -> None:
    add("image", type=Path, help="a PNG that sample.py wrote")
    add("--model", type=Path, help="folder of the bundle, if it is not in models/")
    add("--out", type=Path, default=Path("samples/again"), help="output folder")
    _device(add)


def _editing(add: Add, images: int | str = 1) -> None:
    add("images", type=Path, nargs=images, metavar="image", help="image file")
    add("--gif", action="store_true", help="also write an animation")
    _sampling(add, batch_size=1)


def _sampling(add: Add, *, batch_size: int) -> None:
    add("--out", type=Path, default=Path("samples"), help="output folder")
    add("--size", type=int, choices=(64, 256, 1024), help="pixels; default: the bundle's largest")
    about = "seed of the first image; the others count up"
    add("--seed", type=number(int, *SEEDS), default=0, help=about)
    add("--guidance", type=finite, metavar="F", help="guidance scale of the decoder; 1 is none")
    about = "sampler steps, such as: --steps prior=8 decoder=16"
    add("--steps", nargs="+", type=stage_steps, default=[], metavar="STAGE=N", help=about)
    add("--batch-size", type=positive, default=batch_size, metavar="N", help="images at a time")
    add("--grid", action="store_true", help="also write a contact sheet")
    about = "write a trace into OUT, and print the most expensive operators of each batch"
    add("--profile", action="store_true", help=about)
    add_loading(add)


def add_loading(add: Add) -> None:
    """Add the arguments that load a bundle."""
    about = "folder of the bundle; default: models/demo"
    add("--model", type=Path, default=SHIPPED, help=about)
    about = "dtype of the networks; auto is float16 on a GPU, else float32"
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=about)
    _device(add)


def _device(add: Add) -> None:
    add("--device", help="device such as cpu or cuda:1; default: a GPU if there is one")
    add("--offload", action="store_true", help="keep one stage at a time on the device")


# Each command's arguments, its description and an example.
COMMANDS: dict[str, tuple[Callable[[Add], None], str, str]] = {
    "text": (
        _text,
        "Generate images of prompts.",
        """"a red apple" "a blue star" --count 4 --grid

Each image is written to OUT/PROMPT-seedSEED-SIZE.png, with its prompt, seed, settings
and the fingerprints of its stages as PNG text. A file is replaced only if it has the text
of the same image; otherwise the new file is numbered (…-2.png).""",
    ),
    "vary": (_vary, "Generate variations of an image.", "vary cat.png --count 8 --grid"),
    "interpolate": (
        _interpolate,
        "Interpolate between two images or more, or mix them.",
        "interpolate cat.png star.png --frames 16 --gif",
    ),
    "edit": (
        _edit,
        "Edit an image by the difference between two texts.",
        'edit apple.png --from "a red apple" --to "a green apple" --grid',
    ),
    "inpaint": (
        _inpaint,
        "Repaint a part of an image, or paint around it.",
        'inpaint apple.png "a red apple on a blue background" --mask mask.png --count 4',
    ),
    "reconstruct": (
        partial(_editing, images="+"),
        "Reconstruct images from their latents.",
        "reconstruct photo.jpg --size 256 --steps decoder=50",
    ),
    "again": (
        _again,
        "Reproduce an image bit for bit from its metadata, and compare.",
        """again samples/a-red-apple-seed0-1024.png

The image must be a PNG that sample.py wrote. The bundle is found in models/ by its
fingerprints; the images that it was made from at their old paths, or next to the PNG.""",
    ),
}


def prompt(text: str) -> str:
    """Return a prompt; the name of an image means that the command before it is mistyped."""
    if Path(text).suffix.lower() in {".png", ".jpg", ".jpeg", ".webp", ".gif"}:
        commands = ", ".join(name for name in COMMANDS if name != "text")
        raise argparse.ArgumentTypeError(f"{text} is an image; commands for images are {commands}")
    return text


def stage_steps(text: str) -> tuple[str, int]:
    """Parse STAGE=N."""
    stage, equals, steps = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not STAGE=N, such as decoder=16")
    return stage, positive(steps)
