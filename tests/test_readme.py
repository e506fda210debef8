"""The commands and package names of the documentation are valid."""

import unclip  # isort: skip # noqa: F401

import argparse
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from cli.config_check import CONF, compose_strictly
from unclip import bundle

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]


def prose(page):
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return text.replace("\\\n", " ")


def commands():
    """Yield the words of each command in an indented or fenced block, and in `…` in a sentence.

    A command that is on several pages is yielded once.
    """
    seen = set()
    for page in PAGES:
        text = prose(page)
        lines = re.findall(r"^(?:    |\t)((?:python src/|torchrun |make ).*)$", text, re.MULTILINE)
        lines += re.findall(r"^((?:python src/|torchrun |make ).*)$", text, re.MULTILINE)
        lines += re.findall(r"`((?:python src/|make )[^`…]*)`", text)
        for line in lines:
            words = shlex.split(line, comments=True)
            if tuple(words) not in seen:
                seen.add(tuple(words))
                yield pytest.param(words, id=f"{page.name}: {line[:60]}")


class Parsed(Exception):
    """Raised after a program has parsed its arguments."""


@pytest.fixture
def parse_only(monkeypatch):
    real = argparse.ArgumentParser.parse_args

    def parse(self, *args, **kwargs):
        real(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)


@pytest.mark.parametrize("words", list(commands()))
def test_documented_command_is_valid(words, parse_only, monkeypatch):
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
        config = compose_strictly(script.stem, [*extra, *overrides])
        if script.stem == "train":
            with torch.device("meta"):
                bundle.build(OmegaConf.to_container(config.model, resolve=True))
        return
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_resolves_every_target():
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    result = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_architecture_lists_every_package_of_unclip():
    listed = prose(ROOT / "docs" / "architecture.md").split("## Packages")[1]
    root = ROOT / "src" / "unclip"
    found = [path.parent.name for path in root.glob("*/__init__.py")]
    found += [path.stem for path in root.glob("[!_]*.py")]
    missing = [name for name in found if not re.search(rf"[`.]{name}`", listed)]
    assert not missing


def test_architecture_lists_no_other_package():
    listed = prose(ROOT / "docs" / "architecture.md").split("## Packages")[1]
    names = re.findall(r"`unclip\.([a-z_.]+)`", listed)
    assert names
    for name in names:
        path = ROOT / "src" / "unclip" / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), name
