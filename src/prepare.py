"""Prepare a data set: `emoji`, `folder`, `coco` or `fetch-coco` (see data/README.md)."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cli import Parser, user_message
from cli.ranges import SEEDS, number

BUILD = ("seed", "workers", "overwrite")  # options of every build


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and build the data set."""
    options = _parser().parse_args(arguments)
    try:
        print(options.function(options))
    except ModuleNotFoundError as error:
        fix = f"pip install -e '.[{options.extra}]'"
        print(f"prepare.py: {error.name} is not installed: {fix}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"prepare.py: {user_message(error)}", file=sys.stderr)
        return 2
    return 0


def _emoji(options: argparse.Namespace) -> Path:
    from unclip.emoji.emoji_build import build_emoji, default_counts

    counts = default_counts(options.set, quick=options.quick)
    train = counts["train"]
    train[64] = train[64] if options.train is None else options.train
    for size, count in ((256, options.train_256), (1024, options.train_1024)):
        train[size] = min(train[size], train[64]) if count is None else count
    root = options.out or Path("data") / f"emoji_{options.set.lower()}"
    return build_emoji(root, options.set, counts=counts, **_given(options, *BUILD))


def _folder(options: argparse.Namespace) -> str:
    from unclip.data.prepare.listing import read_folder

    if options.out.resolve().is_relative_to(options.source.resolve()):
        raise ValueError(f"{options.out} is inside {options.source}: choose another folder")
    return _import(read_folder(options.source, options.caption_column), options)


def _coco(options: argparse.Namespace) -> str:
    from unclip.data.prepare.listing import read_coco

    return _import(read_coco(options.source), options)


def _import(listing, options: argparse.Namespace) -> str:
    from unclip.data.prepare.importer import import_images

    settings = _given(options, "sizes", "val", "shard_size", *BUILD)
    return import_images(listing, options.out, **settings)


def _fetch_coco(options: argparse.Namespace) -> str:
    from unclip.data.prepare.coco_download import SOURCE, download_coco

    return download_coco(options.out, source=options.source or SOURCE)


def _given(options: argparse.Namespace, *names: str) -> dict:
    return {name: getattr(options, name) for name in names}


def _parser() -> argparse.ArgumentParser:
    count, positive = ({"type": number(int, low), "metavar": "N"} for low in (0, 1))
    seed = {"type": number(int, *SEEDS), "metavar": "N", "default": 0}
    build = Parser(add_help=False)
    build.add_argument("--seed", **seed, help="seed (default: %(default)s)")
    build.add_argument("--workers", **count, help="processes; 0: this one (default: all cores)")
    overwrite = "replace a data set built with other settings"
    build.add_argument("--overwrite", action="store_true", help=overwrite)

    images = Parser(add_help=False)
    images.add_argument("source", type=Path, metavar="DIR", help="folder of the images")
    images.add_argument("out", type=Path, metavar="OUT", help="target folder")
    sizes = {"type": number(int, 1), "nargs": "+", "default": [64, 256, 1024], "metavar": "PIXELS"}
    images.add_argument("--sizes", **sizes, help="image sizes in pixels (default: 64 256 1024)")
    images.add_argument("--val", **count, help="number of held-out images (default: 5%%)")
    shard_size = "images per shard (default: %(default)s)"
    images.add_argument("--shard-size", **positive, default=1000, help=shard_size)

    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="DATA SET")

    def add(name, function, extra, about, *parents) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about, parents=parents)
        command.set_defaults(function=function, extra=extra)
        return command

    about = "scenes rendered from OpenMoji, with captions and exact object boxes"
    emoji = add("emoji", _emoji, "emoji", about, build)
    emoji.add_argument("--set", choices=("S", "M", "L"), default="S", help="concepts (default: S)")
    emoji.add_argument("--out", type=Path, help="target folder (default: data/emoji_SET)")
    emoji.add_argument("--train", **positive, help="number of training scenes")
    emoji.add_argument("--train-256", **count, help="training scenes also rendered at 256 px")
    emoji.add_argument("--train-1024", **count, help="training scenes also rendered at 1024 px")
    emoji.add_argument("--quick", action="store_true", help="few scenes, to try every command")

    about = "your own images with captions in .txt, .json or a table metadata.*"
    folder = add("folder", _folder, "parquet", about, images, build)
    column = "caption column of the tables (default: captions, caption or text)"
    folder.add_argument("--caption-column", metavar="NAME", help=column)

    about = "COCO's images and captions: DIR has annotations/, train2017/ and val2017/ (or 2014)"
    add("coco", _coco, "parquet", about, images, build)

    about = "MS-COCO val2014 for evaluation: 7 GB"
    fetch = add("fetch-coco", _fetch_coco, "evaluation", about)
    out = "target folder (default: %(default)s)"
    fetch.add_argument("--out", type=Path, default=Path("data/coco"), help=out)
    fetch.add_argument("--source", help="address of a mirror with the same files")
    return parser


if __name__ == "__main__":
    sys.exit(main())
