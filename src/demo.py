"""Generate and edit images with the shipped bundle, and show them on a page: `make demo`."""

import cli  # isort: skip # noqa: F401 (first: Ctrl-C while torch is imported is one line)

import base64
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, FileSystemLoader
from torch import Tensor

from cli import SHIPPED, Parser, user_message
from cli.sample_output import progress_bar
from unclip import Cascade
from unclip.device import set_up_device
from unclip.files import write_text
from unclip.images import to_pil
from unclip.sampling_run import Progress

# The pairs and colors of objects in the last four captions are in no training image.
PROMPTS = (
    "a red heart on a yellow background",
    "a purple umbrella on a yellow background",
    "three red hearts on a white background",
    "a red apple to the left of a dog",
    "a yellow star above a purple crown on a blue background",
    "a pink heart above a butterfly on a yellow background",
    "a green cat on a pink background",
    "a blue dog on an orange background",
)
VARIED, EDITED, PAINTED = 1, 0, 3  # numbers of the images that are edited
EDIT = ("a red heart", "a red apple")
PAINT = "a red apple to the left of a blue car on a purple background"


class Section(NamedTuple):
    """A part of the page: a heading, a sentence, and images with captions."""

    title: str
    about: str
    images: Sequence[tuple[Tensor, str]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and return the exit status: 0, or 2 after a user error."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of the bundle")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the page")
    parser.add_argument("--size", type=int, choices=(64, 256, 1024), default=1024, help="pixels")
    args = parser.parse_args(arguments)
    page, started = args.out / "index.html", time.perf_counter()
    set_up_device()
    try:
        cascade = Cascade.load(args.model)
        args.out.mkdir(parents=True, exist_ok=True)  # fails before the images are computed
        write_text(page, render(make_sections(cascade, args.size), args.model))
    except (ValueError, OSError, MemoryError) as error:
        print(f"demo.py: {user_message(error)}", file=sys.stderr)
        return 2
    python = os.path.relpath(sys.executable)
    print(f"""{time.perf_counter() - started:.0f} s. Open {page.resolve()} in a browser. Next:

  {python} src/sample.py "a purple cat on a yellow background"    your own prompt
  {python} src/sample.py --help    variations, edits, inpainting
  make app      a page in the browser, with your own captions and images
  make train    train all stages from scratch in 30 to 50 minutes""")
    return 0


def make_sections(cascade: Cascade, size: int) -> list[Section]:
    """Generate and edit the images of the page, and print each step."""
    run: dict[str, Any] = {"size": size}
    with step("generating", len(PROMPTS)) as run["progress"]:
        first = cascade.text_to_image(PROMPTS, seeds=range(len(PROMPTS)), **run).images[size]
    with step("varying", 3) as run["progress"]:
        varied = cascade.vary(first[VARIED], 3, **run).images[size]
    with step("editing", 3) as run["progress"]:
        edited = cascade.text_diff(first[EDITED], *EDIT, frames=3, **run).images[size]
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[:, size // 2 :] = True
    with step("inpainting", 2) as run["progress"]:
        painted = cascade.inpaint(first[PAINTED], mask, PAINT, 2, **run).images[size]
    return [
        Section(
            "Text to image",
            "The pairs and colors of objects in the last four captions are in no training image.",
            list(zip(first, PROMPTS, strict=True)),
        ),
        Section(
            "Variations",
            "The decoder samples new images from the CLIP embedding of the first one.",
            [(first[VARIED], "original"), *((image, "variation") for image in varied)],
        ),
        Section(
            "Text edit",
            f"The embedding moves in the direction from “{EDIT[0]}” to “{EDIT[1]}”.",
            [(first[EDITED], "original"), (edited[1], "halfway"), (edited[2], "edited")],
        ),
        Section(
            "Inpainting",
            f"The right half is painted again from the caption “{PAINT}”.",
            [(first[PAINTED], "original"), *((image, "inpainted") for image in painted)],
        ),
    ]


@contextmanager
def step(verb: str, count: int) -> Iterator[Progress]:
    """Print a line about the next step, and show its progress."""
    print(f"{verb} {count} images …", flush=True)
    with progress_bar(verb) as progress:
        yield progress


def render(sections: Sequence[Section], model: Path) -> str:
    """Render the page; all text is escaped, and images are embedded."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters["embedded"] = embed
    about = f"Generated by the bundle {model.name} from captions of emoji scenes."
    title = "unclip: from captions to images"
    page = environment.get_template("demo.html.j2")
    return page.render(title=title, about=about, sections=sections)


def embed(image: Tensor) -> str:
    """Encode an image as a data URL."""
    content = BytesIO()
    to_pil(image).save(content, format="JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


if __name__ == "__main__":
    sys.exit(main())
