"""The workspace is built without an account, of metrics that runs do log."""

import json
import re
from pathlib import Path

import pytest

import dashboard

pytest.importorskip("wandb_workspaces")
SOURCE = Path(__file__).parents[1] / "src" / "unclip"


def test_the_workspace_shows_what_is_logged(capsys):
    assert dashboard.main(["someone", "--project", "mine", "--print"]) == 0
    spec = capsys.readouterr().out
    found = json.loads(spec)
    assert (found["entity"], found["project"]) == ("someone", "mine")
    assert '"samples"' in spec and "trainer/global_step" in spec
    for metric in ("train/loss_q3", "train/memory_gib", "validation/psnr_gain"):
        assert metric in spec


def test_its_metrics_exist():
    code = "\n".join(path.read_text() for path in SOURCE.rglob("*.py"))
    for group in (dashboard.TRAINING, dashboard.MACHINE, dashboard.VALIDATION):
        for metric in (name for names in group.values() for name in names):
            stem = re.sub(r"_(q\d|at_\d)$", "", metric)
            assert re.search(rf"[\"'/{{]{stem}\b|{stem}_", code), metric
