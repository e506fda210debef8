"""Text to image."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sample_commands.arguments import add_run, positive
from sample_commands.console import bar, tell
from sample_commands.loading import open_bundle, size_of
from sample_commands.story import slug, story, write

SHEET_TILES = 100
SHEET_SIZE = 256
ABOUT = """\
Each picture is written as OUT/PROMPT-seedSEED-SIZE.png, with its prompt, seed, settings
and its stages' fingerprints as PNG text. Only a file that tells of the very same
picture is written over; beside any other of that name the new one is numbered (…-2.png)."""


class Job(NamedTuple):
    """One picture to make."""

    prompt: str
    seed: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of text to image."""
    parser.add_argument("prompt", nargs="*", help="what the picture shall show; one or several")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a file with a prompt a line")
    parser.add_argument("--count", type=positive, default=1, help="pictures of each prompt")
    parser.add_argument(
        "--stages", action="store_true", help="keep the smaller pictures too, and a contact sheet"
    )
    parser.add_argument("--grid", action="store_true", help="a contact sheet of the pictures, too")
    parser.add_argument(
        "--prior",
        choices=("diffusion", "ar", "linear", "none"),
        default="diffusion",
        help="how a prompt becomes an image embedding; none takes its text embedding for one",
    )
    parser.add_argument("--prior-guidance", type=float, metavar="F", help="the prior's; 1 is none")
    add_run(
        parser, batch_size=8, why="pictures at a time, for memory's sake; no picture depends on it"
    )


def run(settings: argparse.Namespace) -> None:
    """Makes a picture of each prompt and seed, and writes each batch as soon as it is finished."""
    seeds = range(settings.seed, settings.seed + settings.count)
    jobs = [Job(prompt, seed) for prompt in _prompts(settings) for seed in seeds]

    # Late, so that --help and a missing prompt are answered at once.
    from unclip.contact_sheet import Tile
    from unclip.images import to_pil

    cascade = open_bundle(
        settings.model, on=settings.device, dtype=settings.dtype, offload=settings.offload
    )
    settings.size = size_of(cascade, settings.size)
    settings.out.mkdir(parents=True, exist_ok=True)
    how = _how(settings)
    tiles: list[Tile] = []
    for start in range(0, len(jobs), settings.batch_size):
        batch = jobs[start : start + settings.batch_size]
        with bar(f"pictures {start + 1}–{start + len(batch)} of {len(jobs)}") as progress:
            images = make(cascade, batch, how, progress)
        for size in sorted(images) if settings.stages else [settings.size]:
            for place, image in enumerate(images[size]):
                about = _story(cascade, batch, place, {**how, "size": size})
                name = f"{slug(batch[place].prompt)}-seed{batch[place].seed}-{size}"
                tell(write(to_pil(image), settings.out, name, about))
        for job, image in zip(batch, images[min(SHEET_SIZE, settings.size)], strict=True):
            tiles.append(Tile(image, f"{job.prompt} · {job.seed}"))
    if settings.stages or settings.grid:
        _write_sheets(cascade, tiles, how, settings)


def make(cascade, jobs: Sequence[Job], how: Mapping[str, Any], progress=None) -> dict[int, Any]:
    """The pictures of a batch, by size."""
    return cascade.text_to_image(
        [job.prompt for job in jobs],
        seeds=[job.seed for job in jobs],
        batch_size=len(jobs),
        progress=progress,
        **how,
    ).images


def again(cascade, about: Mapping[str, str], progress=None) -> Any:
    """The picture that a story tells of, in the company of which it was made, to the bit."""
    jobs = [Job(*job) for job in json.loads(about.get("batch", "[]"))]
    jobs = jobs or [Job(about["prompt"], int(about["seed"]))]
    how = json.loads(about["settings"])
    return make(cascade, jobs, how, progress)[how["size"]][int(about.get("place", 0))]


def _how(settings: argparse.Namespace) -> dict[str, Any]:
    return {
        "size": settings.size,
        "prior": settings.prior,
        "guidance_scale": settings.guidance,
        "prior_guidance_scale": settings.prior_guidance,
        "steps": dict(sorted(settings.steps)),
    }


def _story(cascade, batch: Sequence[Job], place: int, how: Mapping[str, Any]) -> dict[str, str]:
    """The PNG text of a picture: everything that it depends on."""
    company = {} if len(batch) == 1 else {"batch": batch, "place": place}
    prompt, seed = batch[place]
    return _told(cascade, how, prompt=prompt, seed=str(seed), **company)


def _told(cascade, how: Mapping[str, Any], **more: Any) -> dict[str, str]:
    """What pictures made with these settings tell, and more."""
    from unclip.cascade import stage_of_prior, stages_for

    prior = stage_of_prior(how["prior"])
    used = ["clip", prior, *stages_for(how["size"])]
    steps = {name: count for name, count in how["steps"].items() if name in used}
    return story(cascade, "text", used, {**how, "steps": steps}, **more)


def _write_sheets(
    cascade, tiles: list, how: Mapping[str, Any], settings: argparse.Namespace
) -> None:
    """Contact sheets, a row a prompt where that fits."""
    from unclip.contact_sheet import contact_sheet

    for start in range(0, len(tiles), SHEET_TILES):
        page = tiles[start : start + SHEET_TILES]
        columns = settings.count if settings.count > 1 else math.ceil(math.sqrt(len(page)))
        sheet = contact_sheet(page, columns=min(columns, 10), size=min(SHEET_SIZE, settings.size))
        about = _told(cascade, how, pictures=[tile.caption for tile in page])
        tell(write(sheet, settings.out, "sheet", about))


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
