"""Code of the command-line scripts in `src/`, and the bundle that comes with the repository."""

import argparse
import difflib
import io
import sys
from pathlib import Path
from typing import NoReturn

# A locale's encoding may lack a character of a message.
if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")


def _excepthook(kind, error, traceback) -> None:
    """Print one line after Ctrl-C or for a missing package, and else the usual traceback."""
    if issubclass(kind, KeyboardInterrupt):
        message = "stopped; run the same command again to continue"
    elif issubclass(kind, ModuleNotFoundError):
        message = f"{error}; `make doctor` lists the command that installs it"
    else:
        return sys.__excepthook__(kind, error, traceback)
    print(f"\n{Path(sys.argv[0]).name}: {message}", file=sys.stderr)


sys.excepthook = _excepthook

SHIPPED = Path(__file__).resolve().parents[2] / "models/demo"


class Parser(argparse.ArgumentParser):
    """Parser of a command line that reports an error in one line."""

    def parse_known_args(self, args=None, namespace=None):
        """Parse arguments; an unknown one is an error that names the nearest option."""
        known, rest = super().parse_known_args(args, namespace)
        if rest:
            near = difflib.get_close_matches(rest[0], self._option_string_actions, 1)
            question = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{question}")
        return known, rest

    def error(self, message: str) -> NoReturn:
        """Exit with the message and the command that lists the arguments."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def refuse_shipped(folder: str | Path, fix: str) -> None:
    """Raise ValueError if a folder is the shipped bundle or a part of it; `fix` says what to do."""
    if Path(folder).resolve().is_relative_to(SHIPPED.resolve()):
        raise ValueError(f"{folder} is the bundle that comes with the repository: {fix}")


def user_message(error: Exception) -> str:
    """Return the message of a user's error; raise any other error again."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError | OSError | MemoryError):
        return str(error)
    if "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "not enough memory: try a smaller --batch-size or --size, or fewer images"
    raise error
