"""Makes pictures with a trained bundle."""

import argparse
import itertools
import json
import math
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import Image, PngImagePlugin
from tqdm import tqdm

SHEET_TILES = 100
SHEET_SIZE = 256


class Command(NamedTuple):
    """A thing that this script can do."""

    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


class Job(NamedTuple):
    """One picture to make."""

    prompt: str
    seed: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names, or `text` when it names none.

    Returns:
        0, 2 after a mistake of the user's, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "text"
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=command.about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    settings = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
            command.run(settings)
    except KeyboardInterrupt:
        _say("stopped; the pictures that were finished are kept")
        return 130
    except (ValueError, OSError, MemoryError) as error:
        _say(f"error: {error}")
        return 2
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        _say("error: there is not enough memory: try a smaller --batch-size or --size")
        return 2
    return 0


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of text to image."""
    parser.add_argument("prompt", nargs="*", help="what the picture shall show; one or several")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a file with a prompt a line")
    parser.add_argument(
        "--model", type=Path, default=Path("models/emoji"), help="a bundle's folder"
    )
    parser.add_argument("--count", type=_positive, default=1, help="pictures of each prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others count up")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder of the pictures")
    parser.add_argument("--size", type=int, choices=(64, 256, 1024), default=1024, help="in pixels")
    parser.add_argument(
        "--stages", action="store_true", help="keep the smaller pictures too, and a contact sheet"
    )
    parser.add_argument("--guidance", type=float, metavar="F", help="the decoder's; 1 is none")
    parser.add_argument(
        "--prior",
        choices=("diffusion", "ar", "linear", "none"),
        default="diffusion",
        help="how a prompt becomes an image embedding; none takes its text embedding for one",
    )
    parser.add_argument("--prior-guidance", type=float, metavar="F", help="the prior's; 1 is none")
    parser.add_argument(
        "--steps",
        nargs="+",
        type=_stage_steps,
        default=[],
        metavar="STAGE=N",
        help="sampler steps, such as: --steps prior=8 decoder=16",
    )
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=8,
        metavar="N",
        help="pictures at a time, for memory's sake; no picture depends on it",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1; a GPU, if there is one")


def text_to_image(settings: argparse.Namespace) -> None:
    """Makes a picture of each prompt and seed, and writes each batch as soon as it is finished."""
    seeds = range(settings.seed, settings.seed + settings.count)
    jobs = [Job(prompt, seed) for prompt in _prompts(settings) for seed in seeds]

    # Late, so that --help and a missing prompt are answered at once.
    from unclip.cascade import Cascade
    from unclip.evaluation.sheets import Tile, to_pil

    cascade = Cascade.load(settings.model, device=_device(settings.device))
    settings.out.mkdir(parents=True, exist_ok=True)
    tiles: list[Tile] = []
    for start in range(0, len(jobs), settings.batch_size):
        batch = jobs[start : start + settings.batch_size]
        with _bar(f"{start + 1}–{start + len(batch)} of {len(jobs)}") as progress:
            images = cascade.text_to_image(
                [job.prompt for job in batch],
                seeds=[job.seed for job in batch],
                size=settings.size,
                prior=settings.prior,
                guidance_scale=settings.guidance,
                prior_guidance_scale=settings.prior_guidance,
                steps=dict(settings.steps),
                batch_size=settings.batch_size,
                progress=progress,
            ).images
        for size in sorted(images) if settings.stages else [settings.size]:
            for job, image in zip(batch, images[size], strict=True):
                about = _story(cascade, job, size, settings)
                name = f"{slug(job.prompt)}-seed{job.seed}-{size}"
                _say(write(to_pil(image), settings.out, name, about), sys.stdout)
        for job, image in zip(batch, images[min(SHEET_SIZE, settings.size)], strict=True):
            tiles.append(Tile(image, f"{job.prompt} · {job.seed}"))
    if settings.stages:
        _write_sheets(tiles, settings)


def _write_sheets(tiles: list, settings: argparse.Namespace) -> None:
    """Contact sheets, a row a prompt where that fits."""
    from unclip.evaluation.sheets import contact_sheet

    for start in range(0, len(tiles), SHEET_TILES):
        page = tiles[start : start + SHEET_TILES]
        columns = settings.count if settings.count > 1 else math.ceil(math.sqrt(len(page)))
        sheet = contact_sheet(page, columns=min(columns, 10), size=min(SHEET_SIZE, settings.size))
        about = {"pictures": json.dumps([tile.caption for tile in page])}
        _say(write(sheet, settings.out, "sheet", about), sys.stdout)


def _story(cascade, job: Job, size: int, settings: argparse.Namespace) -> dict[str, str]:
    """The PNG text of a picture: everything that it depends on."""
    import unclip
    from unclip.cascade import stage_of_prior, stages_for

    used = list(dict.fromkeys(["clip", stage_of_prior(settings.prior), *stages_for(size)]))
    return {
        "prompt": job.prompt,
        "seed": str(job.seed),
        "settings": json.dumps(
            {
                "size": size,
                "guidance_scale": settings.guidance,
                "prior": settings.prior,
                "prior_guidance_scale": settings.prior_guidance,
                "steps": {name: n for name, n in sorted(settings.steps) if name in used},
            }
        ),
        "bundle": json.dumps({name: cascade.metadata[name].fingerprint for name in used}),
        "Software": f"unclip {unclip.__version__}",
    }


def write(image: Image.Image, folder: Path, name: str, story: Mapping[str, str]) -> Path:
    """Writes a PNG with its story as text: over one with the same story, else under a free name."""
    for number in itertools.count(1):
        path = folder / (f"{name}.png" if number == 1 else f"{name}-{number}.png")
        if not path.exists() or _story_of(path) == story:
            break
    text = PngImagePlugin.PngInfo()
    for key, value in story.items():
        text.add_itxt(key, value)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        image.save(unfinished, format="PNG", pnginfo=text)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _story_of(path: Path) -> dict[str, str] | None:
    try:
        with Image.open(path) as image:
            return {key: str(value) for key, value in image.text.items()}
    except (OSError, AttributeError, ValueError):
        return None


def slug(prompt: str) -> str:
    """A prompt as a file name: lower-case letters, digits and hyphens, at most 60."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    return "-".join(re.findall("[a-z0-9]+", plain))[:60].rstrip("-") or "picture"


def _prompts(settings: argparse.Namespace) -> list[str]:
    prompts = list(settings.prompt)
    if settings.prompts is not None:
        lines = settings.prompts.read_text(encoding="utf-8").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(
            'no prompt: try `python src/sample.py "a red apple"`, or give --prompts FILE'
        )
    if any(not prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is blank: say what the picture shall show")
    return prompts


def _device(name: str | None):
    import torch

    try:
        if name is not None:
            torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name} cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    return name


@contextmanager
def _bar(pictures: str) -> Iterator[Callable[[str, int, int], None]]:
    """Progress over stages × steps: a bar for the stage that runs, gone when all are done."""
    with tqdm(disable=None, leave=False) as bar:

        def progress(stage: str, step: int, steps: int) -> None:
            if step == 1:
                bar.reset(steps)
                bar.set_description(f"pictures {pictures}: {stage}")
            bar.update(step - bar.n)

        yield progress


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def _stage_steps(text: str) -> tuple[str, int]:
    stage, equals, steps = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not STAGE=N, such as decoder=16")
    return stage, _positive(steps)


def _say(message: object, file=None) -> None:
    tqdm.write(str(message), file=file or sys.stderr)


COMMANDS = {
    "text": Command(
        "Each picture is written as OUT/PROMPT-seedSEED-SIZE.png, with its prompt, seed, settings\n"
        "and its stages' fingerprints as PNG text. Only a file that tells of the very same\n"
        "picture is written over; beside any other of that name the new one is numbered (…-2.png).",
        add_text_arguments,
        text_to_image,
    ),
}

if __name__ == "__main__":
    sys.exit(main())
