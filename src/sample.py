"""Generate and edit images with a trained bundle: `python src/sample.py --help`."""

import sys
import warnings
from collections.abc import Sequence

from cli import user_message
from cli.sample import COMMANDS, build_parser, log


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, or `text` if it names none.

    Returns:
        0, or 2 after a user error, or 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments.insert(0, "text")
    args = build_parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: log(f"warning: {message}")
            if args.command == "again":  # imports torch, which would slow down --help
                from cli.sample_again import run
            else:
                from cli.sample_images import run
            run(args)
    except KeyboardInterrupt:
        log("stopped; finished images are kept")
        return 130
    except Exception as error:
        log(f"error: {user_message(error)}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
