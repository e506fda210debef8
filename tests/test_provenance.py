import re

import torch
from PIL import Image

from unclip.images import save_png
from unclip.provenance import (
    code_version,
    image_metadata,
    is_same_image,
    package_versions,
    read_image_metadata,
)


def metadata(**more):
    return image_metadata("text", {"size": 64}, {"clip": "abc"}, prompt="ein Käfer", **more)


def test_the_metadata_of_an_image_is_read_back(tmp_path):
    written = metadata(index=3)
    path = save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png", written)
    assert read_image_metadata(path) == written
    assert written["prompt"] == "ein Käfer"
    assert written["settings"] == '{"size": 64}'


def test_a_file_that_is_not_a_png_has_no_metadata(tmp_path):
    (tmp_path / "a.png").write_text("text")
    assert read_image_metadata(tmp_path / "a.png") is None
    assert read_image_metadata(tmp_path / "missing.png") is None


def test_metadata_is_compared_without_the_batch():
    assert is_same_image(metadata(index=3, batch=["a", "b"]), metadata(index=0))
    assert not is_same_image(metadata(seed="1"), metadata(seed="2"))
    assert not is_same_image(None, metadata())


def test_versions_are_those_of_the_imported_packages():
    assert package_versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert package_versions()["pillow"] == Image.__version__
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?", code_version().get("git", "0" * 12))
