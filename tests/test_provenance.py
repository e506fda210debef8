import unclip  # isort: skip # noqa: F401

import re

import torch

from unclip.provenance import code_version


def test_the_code_version_has_the_packages_and_the_commit():
    versions = code_version()
    assert versions["torch"] in (torch.__version__, torch.__version__.split("+")[0])
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?", versions.get("git", "0" * 12))
