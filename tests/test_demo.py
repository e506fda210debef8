"""`make demo` and the shipped bundle: one page, and nothing writes into models/demo."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cli
import demo
from unclip.emoji import COLORS, concepts
from unclip.emoji.catalog import is_cell_held_out, is_pair_held_out

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:a prompt is too long")  # for the tiny CLIP


@pytest.fixture(scope="module")
def page(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert demo.main(["--model", str(tiny_folder), "--size", "64", "--out", str(folder)]) == 0
    return (folder / "index.html").read_text()


def test_the_page_has_all_images_and_needs_no_other_file(page):
    sources = re.findall(r'<img src="([^"]+)"', page)
    assert len(sources) == 8 + 4 + 3 + 3
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not re.search(r"<(script|link)|url\(|https?:", page)
    assert all(prompt in page for prompt in demo.PROMPTS)


def test_only_the_last_four_captions_combine_what_is_held_out():
    by_name = {concept.name: concept for concept in concepts("S")}
    for number, prompt in enumerate(demo.PROMPTS):
        words = prompt.split(" on a")[0].split()
        named = [
            by_name[word.removesuffix("s")] for word in words if word.removesuffix("s") in by_name
        ]
        pair = len(named) == 2 and is_pair_held_out(*named)
        cell = any(is_cell_held_out(named[0], word) for word in words if word in COLORS)
        assert (pair or (len(named) == 1 and cell)) == (number >= 4), prompt


def test_a_missing_bundle_is_one_line(tmp_path, capsys):
    assert demo.main(["--model", str(tmp_path), "--out", str(tmp_path / "page")]) == 2
    assert capsys.readouterr().err.startswith(f"demo.py: {tmp_path} holds no stage")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["", "paper", "../demo/."])
def test_the_shipped_bundle_and_its_folders_are_refused(folder):
    with pytest.raises(ValueError, match=r"comes with the repository: add out=DIR"):
        cli.refuse_shipped(cli.SHIPPED / folder, "add out=DIR")
    cli.refuse_shipped(cli.SHIPPED.with_name("demo2"), "")


def stopped_by(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(ROOT / "src")
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "src" / script), run_name="__main__")
    return str(stopped.value)


def test_evaluation_does_not_write_into_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = stopped_by(monkeypatch, "evaluate.py", f"model={cli.SHIPPED}", "measure=quick")
    assert message.endswith("comes with the repository: add out=DIR")


def test_training_does_not_write_into_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = f"folders.models={cli.SHIPPED.parent}"
    arguments = ["stage=clip", "scale=quick", "bundle=demo", "data.root=data", folders]
    message = stopped_by(monkeypatch, "train.py", *arguments)
    assert message.endswith("comes with the repository: add bundle=NAME")


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_tracks_the_shipped_bundle_alone():
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    paths = ["models/demo/clip.safetensors", "models/emoji/clip.safetensors", "demo/index.html"]
    command = ["git", "check-ignore", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == paths[1:]
