"""A picture made anew from what its PNG text tells."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from sample_commands import edits, text
from sample_commands.console import bar, say, tell
from sample_commands.loading import open_bundle
from sample_commands.story import read, write

ABOUT = """\
The picture must be a PNG that sample.py wrote. The bundle is looked for by its fingerprints in
models/; pictures that it was made from where they were then, or beside it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of again."""
    parser.add_argument("picture", type=Path, help="a PNG that sample.py wrote")
    parser.add_argument("--model", type=Path, help="the bundle's folder, if it is not in models/")
    parser.add_argument("--out", type=Path, default=Path("samples/again"), help="folder for it")
    parser.add_argument("--device", help="such as cpu or cuda:1; a GPU, if there is one")
    parser.add_argument(
        "--offload", action="store_true", help="keep one stage at a time on the device"
    )


def run(settings: argparse.Namespace) -> None:
    """Makes the picture, writes it, and says whether it is the same."""
    about = _story(settings.picture)
    folder = _bundle(json.loads(about["bundle"]), settings.model)

    from unclip.images import to_pil

    dtype = about.get("dtype", "float32")
    cascade = open_bundle(folder, on=settings.device, dtype=dtype, offload=settings.offload)
    command = about.get("command", "text")
    with bar(settings.picture.name) as progress:
        if command == "text":
            image = text.again(cascade, about, progress)
        else:
            image = edits.again(cascade, about, settings.picture.parent, progress)
    made = to_pil(image)
    settings.out.mkdir(parents=True, exist_ok=True)
    tell(write(made, settings.out, settings.picture.stem, about))
    say(_comparison(made, settings.picture))


def _story(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    about = read(path)
    if about is not None and "pictures" in about:
        raise ValueError(f"{path} is a sheet: give one of the pictures on it")
    if about is None or "bundle" not in about or "settings" not in about:
        raise ValueError(f"{path} does not tell how it was made: is it from sample.py?")
    return about


def _bundle(wanted: Mapping[str, str], named: Path | None) -> Path:
    """The folder whose stages have these fingerprints."""
    from unclip.bundle import read_metadata, stage_file

    folders = [named] if named is not None else sorted(Path("models").glob("*/"))
    for folder in folders:
        files = {name: stage_file(folder, name) for name in wanted}
        if all(
            file.is_file() and read_metadata(file).fingerprint == wanted[name]
            for name, file in files.items()
        ):
            return folder
    where = f"{named} is not" if named is not None else "no folder in models/ is"
    raise ValueError(
        f"{where} the bundle that the picture was made with ({json.dumps(dict(wanted))}): "
        "a stage is missing, or was trained again; give its folder by --model"
    )


def _comparison(made: Image.Image, path: Path) -> str:
    """Whether two pictures are the same, in words."""
    with Image.open(path) as then:
        if then.convert("RGB").tobytes() == made.tobytes():
            return "the same, pixel for pixel"
    return (
        "not the same in every pixel: another device, another number of threads or another PyTorch "
        "rounds otherwise"
    )
