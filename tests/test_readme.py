"""Every command that the documentation shows is one that the programs understand."""

import unclip  # isort: skip # noqa: F401

import argparse
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli.config_check import CONF, compose_strictly

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    """(page, words) of each command in an indented or fenced block, and in `…` of running text."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        lines = re.findall(r"^(?:    |\t)((?:python src/|torchrun |make ).*)$", text, re.MULTILINE)
        lines += re.findall(r"^((?:python src/|torchrun |make ).*)$", text, re.MULTILINE)
        lines += re.findall(r"`((?:python src/|make )[^`…]*)`", text)
        for line in dict.fromkeys(lines):
            yield pytest.param(shlex.split(line, comments=True), id=f"{page.name}: {line[:60]}")


class Understood(Exception):
    """Raised where a program would begin to work."""


@pytest.fixture
def parse_only(monkeypatch):
    real = argparse.ArgumentParser.parse_args

    def parse(self, *arguments, **more):
        real(self, *arguments, **more)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_of_the_documentation_is_understood(words, parse_only, monkeypatch):
    if words[0] == "make":
        target = next(word for word in words[1:] if "=" not in word)
        rule = rf"^{re.escape(target)}:.*## "
        assert re.search(rule, (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    words = words[next(i for i, word in enumerate(words) if word.startswith("src/")) :]
    script, arguments = ROOT / words[0], words[1:]
    assert script.is_file()
    config = CONF / f"{script.stem}.yaml"
    if config.is_file():
        overrides = [word for word in arguments if "=" in word]
        extra = [] if any(word.startswith("data.root=") for word in overrides) else ["data.root=x"]
        compose_strictly(script.stem, [*extra, *overrides])
        return
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(Understood):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_knows_what_each_target_would_do():
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    result = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
