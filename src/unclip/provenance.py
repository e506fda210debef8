"""What code a run was made with."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "lightning", "open_clip_torch", "numpy")


def code_version() -> dict[str, str]:
    """Versions of unclip, Python and what a result depends on, and the commit of a clone.

    `git` ends in "+changes" where files of the clone differ from the commit.
    """
    found = {"unclip": version("unclip"), "python": platform.python_version()}
    found |= {name: version(name) for name in PACKAGES}
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit:
        found["git"] = commit + ("+changes" if _git("status", "--porcelain", "-uno") else "")
    return found


def _git(*words: str) -> str:
    """What git says of the folder that this file is in; nothing where there is no git."""
    command = ("git", "-C", str(Path(__file__).parent), *words)
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
