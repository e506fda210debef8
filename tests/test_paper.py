"""docs/paper.md cites code and tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")


def defines(file: str, name: str) -> bool:
    """Return whether a file of the repository exists and defines a name, if one is given."""
    places = [folder / file for folder in (ROOT, ROOT / "src" / "unclip", ROOT / "tests")]
    path = next((path for path in places if path.is_file()), None)
    pattern = rf"^ *(?:class|def) {name}\b"
    return path is not None and bool(not name or re.search(pattern, path.read_text(), re.MULTILINE))


def test_every_cited_file_and_name_exists():
    cited = re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|yaml))(?:::(\w+))?`", PAGE)
    assert len(cited) > 50
    assert not [one for one in cited if not defines(*one)]


def test_every_row_cites_code_or_says_why_there_is_none():
    lines = PAGE.split("## What the emoji")[0].splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("| ")]
    assert rows
    for _, code, tests, deviation in rows:
        if code.strip() == "–":
            assert tests.strip() == "–" and deviation.strip() != "–"
