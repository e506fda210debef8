"""Everything that people read is plain American English (CONTRIBUTING.md)."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUFFIXES = (".py", ".yaml", ".md", ".toml", ".ipynb", ".j2", ".txt", "Makefile", "ci/run")
REJECTED = (
    r"alike amid anew beside lest likewise mend(?:s|ed|ing)? pictures? shall thus upon whilst",
    r"\w*(?:artefact|behaviour|centre|colour|favour|grey|modelling|neighbour)\w*",
    r"\w*(?:initial|normal|organ|random|recogn|quant|special|standard|summar|visual)is[ei]\w*",
    r"\w*optimis(?:e|ed|es|ing|ation)",
)
PHRASES = (
    "are told|at hand|but for|come what may|goes on|hands on|is told|its like|of late"
    "|one a (?:batch|caption|sample|step)|something else than|stands? for|stands? in|what of"
)
# values in shards, captions, protocols and results, which keep their spelling
SAVED = (
    r"""["'`-](?:\w+_)?(?:colours?|recoloured|coloured_pair|centre|neighbours)["'`]"""
    r"|crop: centre|^\| (?:re)?coloured\w* \||a picture of |\bgrey(?=[\",]| background)"
)
WORDS = "|".join(REJECTED).replace(" ", "|")
PATTERN = re.compile(rf"{SAVED}|\b(?P<rejected>{WORDS}|{PHRASES})\b", re.IGNORECASE)


def rejected(text: str) -> list[str]:
    return [match["rejected"] for match in PATTERN.finditer(text) if match["rejected"]]


def test_no_file_has_a_rejected_word():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / name for name in listed.stdout.splitlines() if name.endswith(SUFFIXES)]
    assert paths
    found = [
        f"{path.relative_to(ROOT)}:{number}: {word}"
        for path in paths
        if path.is_file() and path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for word in rejected(line)
    ]
    assert not found, "\n".join(found)
