"""`make docs`: the site builds without a warning and needs no other server."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(find_spec("zensical") is None, reason="pip install -e '.[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "zensical.toml", folder)
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copytree(ROOT / "src" / "unclip", folder / "src" / "unclip")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "site"


def test_every_page_is_in_the_navigation(site):
    home = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="./{page.stem}.html' in home or page.stem == "index"


def test_pages_load_nothing_from_elsewhere(site):
    for page in site.glob("*.html"):
        html = page.read_text()
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?https?:[^>]*", html)
        assert not [tag for tag in loaded if 'rel="canonical"' not in tag], page.name
        assert 'class="mermaid"' not in html  # its script would come from another server


def test_the_reference_has_the_methods_of_the_cascade(site):
    assert 'id="unclip.cascade.Cascade.text_diff"' in (site / "api.html").read_text()
