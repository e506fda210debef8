"""Prepare a data set: `emoji`, `folder`, `coco` or `fetch-coco` (see data/README.md)."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and build the data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="DATA SET")
    _add_emoji(commands)
    _add_folder(commands)
    _add_coco(commands)
    _add_fetch_coco(commands)
    options = parser.parse_args(arguments)
    try:
        print(options.function(options))
    except ModuleNotFoundError as error:
        fix = f"pip install -e '.[{options.extra}]'"
        print(f"prepare.py: {error.name} is not installed: {fix}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    return 0


def _add_command(
    commands, name: str, function: Callable, *, extra: str, help: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help)
    parser.set_defaults(function=function, extra=extra)
    return parser


def _add_build_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="seed (default: %(default)s)")
    workers = "number of processes; 0 uses this one (default: one per core)"
    parser.add_argument("--workers", type=int, help=workers)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a data set built with other settings"
    )


def _add_emoji(commands) -> None:
    about = "scenes rendered from OpenMoji, with captions and exact object boxes"
    parser = _add_command(commands, "emoji", _emoji, extra="emoji", help=about)
    concepts = "concept set (default: %(default)s)"
    parser.add_argument("--set", choices=("S", "M", "L"), default="S", help=concepts)
    parser.add_argument("--out", type=Path, help="target folder (default: data/emoji_SET)")
    parser.add_argument("--train", type=int, metavar="N", help="training scenes at 64 px")
    parser.add_argument("--train-256", type=int, metavar="N", help="of these, also at 256 px")
    parser.add_argument("--train-1024", type=int, metavar="N", help="of these, also at 1024 px")
    parser.add_argument("--quick", action="store_true", help="few scenes, for trying everything")
    _add_build_options(parser)


def _emoji(options: argparse.Namespace) -> Path:
    from unclip.emoji.emoji_build import build_emoji, default_counts

    counts = default_counts(options.set, quick=options.quick)
    train = counts["train"]
    train[64] = train[64] if options.train is None else options.train
    for size, count in ((256, options.train_256), (1024, options.train_1024)):
        train[size] = min(train[size], train[64]) if count is None else count
    return build_emoji(
        options.out or Path("data") / f"emoji_{options.set.lower()}",
        options.set,
        seed=options.seed,
        counts=counts,
        workers=options.workers,
        overwrite=options.overwrite,
    )


def _add_folder(commands) -> None:
    about = "your own images with captions in .txt, .json or a table metadata.*"
    parser = _add_command(commands, "folder", _folder, extra="parquet", help=about)
    _add_import_options(parser, "folder of images")
    column = "caption column of the tables (default: captions, caption or text)"
    parser.add_argument("--caption-column", metavar="NAME", help=column)


def _add_coco(commands) -> None:
    about = "COCO's images and captions: DIR has annotations/, train2017/ and val2017/ (or 2014)"
    parser = _add_command(commands, "coco", _coco, extra="parquet", help=about)
    _add_import_options(parser, "folder in which COCO was unpacked")


def _add_import_options(parser: argparse.ArgumentParser, source: str) -> None:
    parser.add_argument("source", type=Path, metavar="DIR", help=source)
    parser.add_argument("out", type=Path, metavar="OUT", help="target folder")
    sizes = "image sizes in pixels (default: 64 256 1024)"
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[64, 256, 1024], metavar="PIXELS", help=sizes
    )
    parser.add_argument("--val", type=int, metavar="N", help="held-out images (default: 5%%)")
    shard_size = "images per shard (default: %(default)s)"
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help=shard_size)
    _add_build_options(parser)


def _folder(options: argparse.Namespace) -> str:
    from unclip.data.prepare.image_folder import read_folder

    if options.out.resolve().is_relative_to(options.source.resolve()):
        raise ValueError(f"{options.out} is inside {options.source}: choose another folder")
    return _import(options, read_folder(options.source, options.caption_column))


def _coco(options: argparse.Namespace) -> str:
    from unclip.data.prepare.coco_captions import read_coco

    return _import(options, read_coco(options.source))


def _import(options: argparse.Namespace, listing) -> str:
    from unclip.data.prepare.importer import ImportSettings, import_images

    settings = ImportSettings(
        sizes=tuple(options.sizes),
        val=options.val,
        shard_size=options.shard_size,
        seed=options.seed,
    )
    return import_images(
        listing, options.out, settings, workers=options.workers, overwrite=options.overwrite
    )


def _add_fetch_coco(commands) -> None:
    about = "MS-COCO val2014 for evaluation: 7 GB"
    parser = _add_command(commands, "fetch-coco", _fetch_coco, extra="evaluation", help=about)
    parser.add_argument("--out", type=Path, default=Path("data/coco"), help="default: %(default)s")
    parser.add_argument("--source", help="address of a mirror with the same files")


def _fetch_coco(options: argparse.Namespace) -> str:
    from unclip.data.prepare.coco_download import SOURCE, download_coco

    return download_coco(options.out, source=options.source or SOURCE)


if __name__ == "__main__":
    sys.exit(main())
