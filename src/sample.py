"""Makes pictures with a trained bundle."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from sample_commands import edits, remake, text
from sample_commands.console import say
from sample_commands.story import slug as slug


class Command(NamedTuple):
    """A thing that this script can do."""

    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names, or `text` when it names none.

    Returns:
        0, 2 after a mistake of the user's, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "text"
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"sample.py {name}",
        description=__doc__,
        epilog=command.about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    settings = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
            command.run(settings)
    except KeyboardInterrupt:
        say("stopped; the pictures that were finished are kept")
        return 130
    except (ValueError, OSError, MemoryError) as error:
        say(f"error: {error}")
        return 2
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        say("error: there is not enough memory: try a smaller --batch-size or --size")
        return 2
    return 0


def _command(name: str, edit: edits.Edit) -> Command:
    about = f"{edit.about} For example:\n\n    python src/sample.py {edit.example}"
    return Command(about, edit.add, partial(edits.run, name))


_ABOUT = f"""\
For example:

    python src/sample.py "a red apple" "a blue star" --count 4 --grid

{text.ABOUT}

The first word may name another command, which has its own --help:
vary, interpolate, edit, inpaint, reconstruct (pictures in), again (a picture made anew)."""

COMMANDS = {
    "text": Command(_ABOUT, text.add_arguments, text.run),
    **{name: _command(name, edit) for name, edit in edits.EDITS.items()},
    "again": Command(
        f"Makes a picture anew, bit for bit. For example:\n\n"
        f"    python src/sample.py again samples/a-red-apple-seed0-1024.png\n\n{remake.ABOUT}",
        remake.add_arguments,
        remake.run,
    ),
}

if __name__ == "__main__":
    sys.exit(main())
