"""The commands that start from pictures: vary, interpolate, edit, inpaint, reconstruct."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sample_commands.arguments import add_run, positive
from sample_commands.console import bar, tell
from sample_commands.loading import open_bundle, size_of
from sample_commands.sequences import write_gif
from sample_commands.story import file_hash, slug, story, write

SHEET_SIZE = 256
COLUMNS = 6


class Made(NamedTuple):
    """A sequence of pictures: uint8 by size, and a caption for each."""

    images: dict[int, Any]
    captions: list[str]


class Edit(NamedTuple):
    """A command.

    Attributes:
        about: what it does.
        example: a command line.
        add_arguments: adds what is its own.
        keys: those of its arguments that a picture depends on, beside the pictures it starts from.
        make: `make(cascade, pictures, settings, **run)`, with the values of `keys` in `settings`.
        pictures: which of its arguments name pictures.
    """

    about: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    keys: tuple[str, ...]
    make: Callable[..., Made]
    pictures: tuple[str, ...] = ("image",)

    def add(self, parser: argparse.ArgumentParser) -> None:
        """All arguments of the command."""
        self.add_arguments(parser)
        parser.add_argument("--grid", action="store_true", help="all pictures on a sheet, too")
        parser.add_argument("--gif", action="store_true", help="the sequence as an animation, too")
        add_run(parser, batch_size=1, why="pictures at a time; more is faster on a GPU")


def run(name: str, settings: argparse.Namespace) -> None:
    """Makes the pictures of an edit and writes them."""
    edit = EDITS[name]
    paths = {key: _paths(getattr(settings, key)) for key in edit.pictures}
    inputs = [
        {"name": key, "path": str(path), "sha256": file_hash(path)}
        for key, group in paths.items()
        for path in group
    ]

    from unclip.contact_sheet import Tile, contact_sheet
    from unclip.images import to_pil

    cascade = open_bundle(
        settings.model, on=settings.device, dtype=settings.dtype, offload=settings.offload
    )
    settings.size = size_of(cascade, settings.size)
    settings.out.mkdir(parents=True, exist_ok=True)
    how = {key: getattr(settings, key) for key in edit.keys}
    how |= {
        "seed": settings.seed,
        "size": settings.size,
        "guidance_scale": settings.guidance,
        "steps": dict(sorted(settings.steps)),
        "batch_size": settings.batch_size,
    }
    with bar(name) as progress:
        made = make(cascade, name, paths, how, progress)
    stem = f"{slug(paths['image'][0].stem)}-{name}-seed{settings.seed}"
    for place, image in enumerate(made.images[settings.size]):
        about = _story(cascade, name, inputs, how, place=place)
        tell(write(to_pil(image), settings.out, f"{stem}-{place:02}-{settings.size}", about))
    if settings.grid:
        shown = made.images[min(SHEET_SIZE, settings.size)]
        tiles = [Tile(*pair) for pair in zip(shown, made.captions, strict=True)]
        columns = min(COLUMNS, len(tiles))
        sheet = contact_sheet(tiles, columns=columns, size=shown.shape[-1])
        about = _story(cascade, name, inputs, how, pictures=made.captions)
        tell(write(sheet, settings.out, f"{stem}-sheet", about))
    if settings.gif:
        frames = [to_pil(image) for image in made.images[settings.size]]
        about = json.dumps(_story(cascade, name, inputs, how))
        tell(write_gif(frames, settings.out, f"{stem}-{settings.size}", about))


def make(
    cascade,
    name: str,
    paths: Mapping[str, Sequence[Path]],
    how: Mapping[str, Any],
    progress: Callable[[str, int, int], None] | None = None,
) -> Made:
    """The pictures of an edit."""
    edit = EDITS[name]
    own = {key: how[key] for key in edit.keys}
    rest = {key: value for key, value in how.items() if key not in edit.keys}
    return edit.make(cascade, paths, own, progress=progress, **rest)


def again(cascade, about: Mapping[str, str], folder: Path, progress=None) -> Any:
    """The picture that a story tells of, to the bit.

    Raises:
        FileNotFoundError: a picture that it was made from is gone.
        ValueError: it is another one now.
    """
    paths: dict[str, list[Path]] = {}
    for given in json.loads(about["inputs"]):
        paths.setdefault(given["name"], []).append(_found(given, folder))
    for key in EDITS[about["command"]].pictures:
        paths.setdefault(key, [])
    how = json.loads(about["settings"])
    made = make(cascade, about["command"], paths, how, progress)
    return made.images[how["size"]][int(about["place"])]


def _found(given: Mapping[str, str], folder: Path) -> Path:
    """A picture that something was made from: where it was, or beside what was made from it."""
    for path in (Path(given["path"]), folder / Path(given["path"]).name):
        if path.is_file():
            if file_hash(path) != given["sha256"]:
                raise ValueError(f"{path} is another picture than the one that was taken then")
            return path
    raise FileNotFoundError(
        f"{given['path']}, which the picture was made from, is gone: put it back, or beside it"
    )


def _paths(given: Path | Sequence[Path] | None) -> list[Path]:
    if given is None:
        return []
    return [given] if isinstance(given, Path) else list(given)


def _story(
    cascade, name: str, inputs: list[dict[str, str]], how: Mapping[str, Any], **more: Any
) -> dict[str, str]:
    from unclip.cascade import stages_for

    used = ["clip", *stages_for(how["size"])]
    if how.get("prompt") is not None:
        used.insert(1, "prior")
    steps = {stage: count for stage, count in how["steps"].items() if stage in used}
    more = {key: str(value) if key == "place" else value for key, value in more.items()}
    return story(cascade, name, used, {**how, "steps": steps}, inputs=inputs, **more)


def _vary_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, help="the picture to vary")
    parser.add_argument("--count", type=positive, default=4, help="how many")
    parser.add_argument(
        "--eta", type=float, default=0.5, help="0 reconstructs; up to 1, the freer the variations"
    )


def _vary(cascade, paths, own, **run) -> Made:
    (image,) = paths["image"]
    images = cascade.vary(image, own["count"], eta=own["eta"], **run).images
    return Made(images, [f"seed {run['seed'] + k}" for k in range(own["count"])])


def _interpolate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, nargs="+", help="two pictures or more to pass through")
    parser.add_argument("--frames", type=positive, default=9, help="from each picture to the next")
    parser.add_argument(
        "--weights", type=float, nargs="+", help="one picture instead, these of each picture in it"
    )
    parser.add_argument(
        "--noise",
        choices=("slerp", "fixed"),
        default="slerp",
        help="what the embedding leaves open: between the pictures, too, or drawn once by the seed",
    )


def _interpolate(cascade, paths, own, **run) -> Made:
    images, weights = paths["image"], own["weights"]
    if weights is None and len(images) < 2:
        raise ValueError("an interpolation needs two pictures or more")
    rows = [weights] if weights is not None else _path_through(len(images), own["frames"])
    made = cascade.mix(images, rows, noise=own["noise"], **run).images
    return Made(made, [" : ".join(f"{weight:.2g}" for weight in row) for row in rows])


def _path_through(points: int, frames: int) -> list[list[float]]:
    """Weights on the way from each of some points to the next, every point once."""
    rows = []
    for start in range(points - 1):
        for frame in range(min(start, 1), frames):
            at = frame / max(frames - 1, 1)
            row = [0.0] * points
            row[start : start + 2] = [1 - at, at]
            rows.append(row)
    return rows


def _edit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, help="the picture to edit")
    parser.add_argument(
        "--from", dest="source", default="", metavar="TEXT", help="what it shows; nothing will do"
    )
    parser.add_argument(
        "--to", dest="target", required=True, metavar="TEXT", help="what it shall show"
    )
    parser.add_argument("--strength", type=float, default=0.5, help="how far; from 0.25 to 0.5")
    parser.add_argument("--frames", type=positive, default=6, help="pictures on the way")


def _edit(cascade, paths, own, **run) -> Made:
    (image,), frames = paths["image"], own["frames"]
    texts = own["source"], own["target"]
    how = {"strength": own["strength"], "frames": frames}
    images = cascade.text_diff(image, *texts, **how, **run).images
    steps = [own["strength"] * (k / (frames - 1) if frames > 1 else 1) for k in range(frames)]
    return Made(images, [f"turned by {at:.2f}" for at in steps])


def _inpaint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, help="the picture to complete")
    parser.add_argument("prompt", nargs="?", help="what the whole shall show; else what it shows")
    parser.add_argument("--mask", type=Path, help="a picture, white where to paint")
    parser.add_argument(
        "--margin", type=float, help="paint around the picture, this share of its side, instead"
    )
    parser.add_argument("--count", type=positive, default=1, help="how many")


def _inpaint(cascade, paths, own, **run) -> Made:
    (image,), masks = paths["image"], paths["mask"]
    if (own["margin"] is None) == (not masks):
        raise ValueError("say where to paint: --mask FILE, or --margin 0.25 for all around")
    captions = [f"seed {run['seed'] + k}" for k in range(own["count"])]
    if masks:
        made = cascade.inpaint(image, masks[0], own["prompt"], own["count"], **run)
    else:
        margin = own["margin"]
        made = cascade.outpaint(image, own["prompt"], own["count"], margin=margin, **run)
    return Made(made.images, captions)


def _reconstruct_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, nargs="+", help="the pictures")


def _reconstruct(cascade, paths, own, **run) -> Made:
    images = cascade.reconstruct(paths["image"], **run).images
    return Made(images, [path.name for path in paths["image"]])


EDITS = {
    "vary": Edit(
        "Other pictures of the same content and style.",
        "vary cat.png --count 8 --grid",
        _vary_arguments,
        ("count", "eta"),
        _vary,
    ),
    "interpolate": Edit(
        "The way from one picture to another, or a mixture of several.",
        "interpolate cat.png star.png --frames 16 --gif",
        _interpolate_arguments,
        ("frames", "weights", "noise"),
        _interpolate,
    ),
    "edit": Edit(
        "A picture moved as a text moves.",
        'edit apple.png --from "a red apple" --to "a green apple" --grid',
        _edit_arguments,
        ("source", "target", "strength", "frames"),
        _edit,
    ),
    "inpaint": Edit(
        "A picture with a part, or its surroundings, painted anew.",
        'inpaint apple.png "a red apple on a blue background" --mask mask.png --count 4',
        _inpaint_arguments,
        ("prompt", "margin", "count"),
        _inpaint,
        pictures=("image", "mask"),
    ),
    "reconstruct": Edit(
        "Pictures through their latents and back: what the decoder can say of them at all.",
        "reconstruct photo.jpg --size 256 --steps decoder=50",
        _reconstruct_arguments,
        (),
        _reconstruct,
    ),
}
