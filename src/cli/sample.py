"""Parse the commands of sample.py, without importing torch, so that `--help` is quick."""

import argparse
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")
COMMANDS = ("text", "vary", "interpolate", "edit", "inpaint", "reconstruct", "again")
_FILES = """
Each image is written to OUT/PROMPT-seedSEED-SIZE.png, with its prompt, seed, settings
and the fingerprints of its stages as PNG text. A file is replaced only if it has the text
of the same image; otherwise the new file is numbered (…-2.png)."""
_AGAIN = """
The image must be a PNG that sample.py wrote. The bundle is found in models/ by its
fingerprints; the images that it was made from at their old paths, or next to the PNG."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with a subparser for each of `COMMANDS`."""
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description="Generate and edit images with a trained bundle.",
        epilog="The word text may be left out. Each command has its own --help.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_text, _vary, _interpolate, _edit, _inpaint, _reconstruct, _again):
        add(commands)
    return parser


def _command(commands, name: str, about: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"For example:\n\n    python src/sample.py {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _text(commands) -> None:
    example = '"a red apple" "a blue star" --count 4 --grid'
    parser = _command(commands, "text", "Generate images of prompts.", f"{example}\n{_FILES}")
    add = parser.add_argument
    add("prompts", nargs="*", metavar="prompt", help="description of an image")
    add("--prompts", dest="prompts_file", type=Path, metavar="FILE", help="file: a prompt per line")
    add("--count", type=positive, default=1, help="number of images per prompt")
    add("--stages", action="store_true", help="also write the smaller sizes and a contact sheet")
    add(
        "--prior",
        choices=("diffusion", "ar", "linear", "none"),
        default="diffusion",
        help="method that predicts image embeddings; none uses text embeddings instead",
    )
    add("--prior-guidance", type=float, metavar="F", help="guidance scale of the prior; 1 is none")
    _add_shared(parser, batch_size=8)


def _vary(commands) -> None:
    about = "Generate variations of an image."
    parser = _edit_command(commands, "vary", about, "vary cat.png --count 8 --grid", 1)
    parser.add_argument("--count", type=positive, default=4, help="number of images")
    parser.add_argument("--eta", type=float, default=0.5, help="0 reconstructs; 1 varies most")


def _interpolate(commands) -> None:
    about = "Interpolate between two images or more, or mix them."
    example = "interpolate cat.png star.png --frames 16 --gif"
    add = _edit_command(commands, "interpolate", about, example, "+").add_argument
    add("--frames", type=positive, default=9, help="frames from each image to the next")
    add("--weights", type=float, nargs="+", help="make one mixture, with a weight for each image")
    add(
        "--noise",
        choices=("slerp", "fixed"),
        default="slerp",
        help="slerp interpolates the noise latent as well; fixed samples one by the seed",
    )


def _edit(commands) -> None:
    about = "Edit an image by the difference between two texts."
    example = 'edit apple.png --from "a red apple" --to "a green apple" --grid'
    add = _edit_command(commands, "edit", about, example, 1).add_argument
    add("--from", dest="source", default="", metavar="TEXT", help="description of it; optional")
    add("--to", dest="target", required=True, metavar="TEXT", help="description of the result")
    add("--strength", type=float, default=0.5, help="largest angle of the edit, often 0.25 to 0.5")
    add("--frames", type=positive, default=6, help="number of images, of increasing strength")


def _inpaint(commands) -> None:
    about = "Repaint a part of an image, or paint around it."
    example = 'inpaint apple.png "a red apple on a blue background" --mask mask.png --count 4'
    add = _edit_command(commands, "inpaint", about, example, 1).add_argument
    add("prompt", nargs="?", help="description of the whole result; default: as the image")
    add("--mask", type=Path, help="image that is white where to paint")
    add("--margin", type=float, help="paint around the image instead; a fraction of its side")
    add("--count", type=positive, default=1, help="number of images")


def _reconstruct(commands) -> None:
    about = "Reconstruct images from their latents."
    example = "reconstruct photo.jpg --size 256 --steps decoder=50"
    _edit_command(commands, "reconstruct", about, example, "+")


def _edit_command(
    commands, name: str, about: str, example: str, images: int | str
) -> argparse.ArgumentParser:
    parser = _command(commands, name, about, example)
    parser.add_argument("images", type=Path, nargs=images, metavar="image", help="image file")
    parser.add_argument("--gif", action="store_true", help="also write an animation")
    _add_shared(parser, batch_size=1)
    parser.set_defaults(mask=None)
    return parser


def _again(commands) -> None:
    about = "Reproduce an image bit for bit from its metadata, and compare."
    example = f"again samples/a-red-apple-seed0-1024.png\n{_AGAIN}"
    parser = _command(commands, "again", about, example)
    add = parser.add_argument
    add("image", type=Path, help="a PNG that sample.py wrote")
    add("--model", type=Path, help="folder of the bundle, if it is not in models/")
    add("--out", type=Path, default=Path("samples/again"), help="output folder")
    _add_device(parser)


def _add_shared(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    add = parser.add_argument
    add("--model", type=Path, default=Path("models/emoji"), help="folder of the bundle")
    add("--out", type=Path, default=Path("samples"), help="output folder")
    add("--size", type=int, choices=(64, 256, 1024), help="pixels; default: the bundle's largest")
    add("--seed", type=int, default=0, help="seed of the first image; the others count up")
    add("--guidance", type=float, metavar="F", help="guidance scale of the decoder; 1 is none")
    add(
        "--steps",
        nargs="+",
        type=stage_steps,
        default=[],
        metavar="STAGE=N",
        help="sampler steps, such as: --steps prior=8 decoder=16",
    )
    add("--batch-size", type=positive, default=batch_size, metavar="N", help="images at a time")
    add("--grid", action="store_true", help="also write a contact sheet")
    add("--dtype", choices=DTYPES, default="float32", help="dtype of the networks")
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", help="device such as cpu or cuda:1; default: a GPU if there is one")
    add("--offload", action="store_true", help="keep one stage at a time on the device")


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def stage_steps(text: str) -> tuple[str, int]:
    """Parse STAGE=N."""
    stage, equals, steps = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not STAGE=N, such as decoder=16")
    return stage, positive(steps)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts of the command line and of the file.

    Raises:
        ValueError: there is no prompt, or one is blank.
    """
    prompts = list(args.prompts)
    if args.prompts_file is not None:
        lines = args.prompts_file.read_text(encoding="utf-8").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError('no prompt: try `python src/sample.py "a red apple"`, or --prompts FILE')
    if any(not prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is blank: describe the image")
    return prompts
