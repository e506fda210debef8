"""Code of the command-line scripts in `src/`, and the bundle that comes with the repository."""

import io
import sys
from pathlib import Path

# A locale's encoding may lack a character of a message.
if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")

SHIPPED = Path(__file__).resolve().parents[2] / "models/demo"


def refuse_shipped(folder: str | Path, fix: str) -> None:
    """Raise ValueError if a folder is the shipped bundle or a part of it; `fix` says what to do."""
    if Path(folder).resolve().is_relative_to(SHIPPED.resolve()):
        raise ValueError(f"{folder} is the bundle that comes with the repository: {fix}")


def user_message(error: Exception) -> str:
    """Return the message of a user's error; raise any other error again."""
    if isinstance(error, ValueError | OSError | MemoryError):
        return str(error)
    if "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "not enough memory: try a smaller --batch-size or --size, or fewer images"
    raise error
