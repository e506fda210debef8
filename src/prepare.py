"""Prepare a data set: `python src/prepare.py emoji`, or `folder DIR OUT` (see data/README.md)."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and build the data set it names."""
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
        mend = f"pip install -e '.[{options.extra}]'"
        print(f"prepare.py: {error.name} is not installed: {mend}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    return 0


def _add_emoji(commands) -> None:
    parser = commands.add_parser(
        "emoji",
        help="scenes drawn from OpenMoji, with captions and the exact objects",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--set", choices=("S", "M", "L"), default="S", help="the concepts")
    parser.add_argument("--out", type=Path, help="the data set's folder (default: data/emoji_SET)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, metavar="N", help="training scenes at 64 px")
    parser.add_argument("--train-256", type=int, metavar="N", help="of these, also at 256 px")
    parser.add_argument("--train-1024", type=int, metavar="N", help="of these, also at 1024 px")
    parser.add_argument("--workers", type=int, help="processes (default: one a core; 0: none)")
    parser.add_argument("--quick", action="store_true", help="few scenes, to try everything")
    parser.add_argument("--overwrite", action="store_true", help="replace other settings' data")
    parser.set_defaults(function=_emoji, extra="emoji")


def _emoji(options: argparse.Namespace) -> Path:
    from unclip.emoji.emoji_build import build, default_counts

    counts = default_counts(options.set, quick=options.quick)
    train = counts["train"]
    train[64] = train[64] if options.train is None else options.train
    for size, asked in ((256, options.train_256), (1024, options.train_1024)):
        train[size] = min(train[size], train[64]) if asked is None else asked
    return build(
        options.out or Path("data") / f"emoji_{options.set.lower()}",
        options.set,
        seed=options.seed,
        counts=counts,
        workers=options.workers,
        overwrite=options.overwrite,
    )


def _add_folder(commands) -> None:
    parser = commands.add_parser(
        "folder",
        help="your own pictures with captions in .txt, .json or a table metadata.*",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="DIR", help="the folder of pictures")
    _add_own(parser)
    parser.add_argument("--caption-column", help="of the tables (captions, caption or text)")
    parser.set_defaults(function=_folder, extra="parquet")


def _add_coco(commands) -> None:
    parser = commands.add_parser(
        "coco",
        help="COCO's captions: DIR has annotations/, train2017/ and val2017/ (or 2014)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="DIR", help="where COCO was unpacked")
    _add_own(parser)
    parser.set_defaults(function=_coco, extra="parquet")


def _add_own(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="the data set's folder")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[64, 256, 1024], help="sides in pixels"
    )
    parser.add_argument("--val", type=int, metavar="N", help="pictures held out (5%%)")
    parser.add_argument("--shard-size", type=int, default=1000, help="pictures of a shard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes (default: one a core; 0: none)")
    parser.add_argument("--overwrite", action="store_true", help="replace other settings' data")


def _folder(options: argparse.Namespace) -> str:
    from unclip.data.own import read_folder

    if options.out.resolve().is_relative_to(options.source.resolve()):
        raise ValueError(f"{options.out} lies in {options.source}: choose a folder elsewhere")
    return _build(options, read_folder(options.source, options.caption_column))


def _coco(options: argparse.Namespace) -> str:
    from unclip.data.own import read_coco

    return _build(options, read_coco(options.source))


def _build(options: argparse.Namespace, found) -> str:
    from unclip.data.own import Settings, build

    settings = Settings(
        sizes=tuple(options.sizes),
        val=options.val,
        shard_size=options.shard_size,
        seed=options.seed,
    )
    return build(found, options.out, settings, workers=options.workers, overwrite=options.overwrite)


def _add_fetch_coco(commands) -> None:
    parser = commands.add_parser("fetch-coco", help="MS-COCO's val2014, to evaluate on: 7 GB")
    parser.add_argument("--out", type=Path, default=Path("data/coco"), help="the folder")
    parser.add_argument("--source", help="a mirror with the same files")
    parser.set_defaults(function=_fetch_coco, extra="evaluation")


def _fetch_coco(options: argparse.Namespace) -> str:
    from unclip.data.coco import SOURCE, fetch

    return fetch(options.out, source=options.source or SOURCE)


if __name__ == "__main__":
    sys.exit(main())
