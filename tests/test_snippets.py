"""The Python code of the documentation runs."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_shards import write_shards

from cli import SHIPPED
from unclip.data.prepare.listing import read_folder

ROOT = Path(__file__).parents[1]


def run_snippets(page: str) -> dict:
    """Run the Python blocks of a page one after another, and return their names."""
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.skipif(not SHIPPED.is_dir(), reason="models/demo is missing")
@pytest.mark.parametrize(
    ("page", "name"), [("README.md", "generated"), ("docs/editing.md", "again")]
)
def test_the_shipped_bundle_runs_the_code_of(page, name, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "demo").symlink_to(SHIPPED)
    Image.new("RGB", (80, 70), "orange").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    assert max(run_snippets(page)[name].images) in (256, 1024)


def test_the_images_of_the_fine_tuning_example_are_mosaics_with_captions(tmp_path, monkeypatch):
    write_shards(tmp_path / "data" / "emoji_s", splits=("train",), sizes=(256,), images=4)
    monkeypatch.chdir(tmp_path)
    run_snippets("docs/finetuning.md")
    listing = read_folder("data/mosaic_images")
    assert len(listing.records) == 4 and not listing.rejected
    pixels = np.asarray(Image.open(next(Path("data/mosaic_images").glob("*.png"))))
    assert (pixels.reshape(16, 16, 16, 16, 3) == pixels[::16, ::16].reshape(16, 1, 16, 1, 3)).all()
