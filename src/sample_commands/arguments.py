"""Arguments that several commands take."""

import argparse
from pathlib import Path

from sample_commands.loading import add_memory


def add_run(parser: argparse.ArgumentParser, *, batch_size: int, why: str) -> None:
    """Which bundle, how, and where to.

    Args:
        parser: to add to.
        batch_size: the default.
        why: what it is good for.
    """
    parser.add_argument(
        "--model", type=Path, default=Path("models/emoji"), help="a bundle's folder"
    )
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder of the pictures")
    parser.add_argument(
        "--size", type=int, choices=(64, 256, 1024), help="in pixels; all that the bundle can"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others count up")
    parser.add_argument("--guidance", type=float, metavar="F", help="the decoder's; 1 is none")
    parser.add_argument(
        "--steps",
        nargs="+",
        type=stage_steps,
        default=[],
        metavar="STAGE=N",
        help="sampler steps, such as: --steps prior=8 decoder=16",
    )
    parser.add_argument("--batch-size", type=positive, default=batch_size, metavar="N", help=why)
    parser.add_argument("--device", help="such as cpu or cuda:1; a GPU, if there is one")
    add_memory(parser)


def positive(text: str) -> int:
    """A whole number above 0."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def stage_steps(text: str) -> tuple[str, int]:
    """STAGE=N."""
    stage, equals, steps = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not STAGE=N, such as decoder=16")
    return stage, positive(steps)
