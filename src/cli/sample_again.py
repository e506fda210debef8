"""Reproduce an image of sample.py from the command that is stored in its metadata."""

import json
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from cli.sample import log
from cli.sample_images import generate
from cli.sample_output import open_cascade, progress_bar, read_command, write_png
from unclip.bundle import read_metadata, stage_file
from unclip.files import sha256_of
from unclip.images import to_pil


def run(args: Namespace) -> None:
    """Generate the image again, write it, and print whether it is the same."""
    if not args.image.is_file():
        raise FileNotFoundError(f"there is no {args.image}")
    metadata = read_command(args.image)
    settings = json.loads(metadata["settings"])
    stored = Namespace(**{**vars(args), **settings, "command": metadata["command"]})
    stored.model = _find_bundle(json.loads(metadata["bundle"]), args.model)
    if stored.command == "text":
        stored.batch = json.loads(metadata["batch"])
    else:
        inputs = json.loads(metadata["inputs"])
        found = {path: _find(Path(path), inputs[path], args.image.parent) for path in inputs}
        stored.images = [found[path] for path in stored.images]
        stored.mask = found.get(stored.mask)
    cascade = open_cascade(stored)
    with progress_bar(args.image.name) as progress:
        images, _ = generate(cascade, stored, progress)
    image = to_pil(images[stored.size][int(metadata["index"])])
    log(write_png(image, args.out, args.image.stem, metadata), sys.stdout)
    with Image.open(args.image) as original:
        same = original.convert("RGB").tobytes() == image.tobytes()
    different = "another device, number of threads or version of PyTorch rounds differently"
    log("the same, pixel for pixel" if same else f"not the same in every pixel: {different}")


def _find_bundle(fingerprints: Mapping[str, str], named: Path | None) -> Path:
    """Return the bundle whose stages have these fingerprints."""

    def has(folder: Path, name: str) -> bool:
        file = stage_file(folder, name)
        return file.is_file() and read_metadata(file).fingerprint == fingerprints[name]

    for folder in [named] if named else sorted(Path("models").glob("*/")):
        if all(has(folder, name) for name in fingerprints):
            return folder
    where = "no folder in models/ is" if named is None else f"{named} is not"
    raise ValueError(
        f"{where} the bundle that made the image ({json.dumps(fingerprints)}): "
        "a stage is missing or was trained again; give the bundle's folder by --model"
    )


def _find(path: Path, sha256: str, folder: Path) -> Path:
    """Return the path of an input image: its old path, or the same name in `folder`."""
    for candidate in (path, folder / path.name):
        if candidate.is_file():
            if sha256_of(candidate) != sha256:
                raise ValueError(f"{candidate} has changed since the image was made from it")
            return candidate
    raise FileNotFoundError(
        f"{path}, which the image was made from, is missing: put it back, or into {folder}"
    )
