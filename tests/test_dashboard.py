"""The workspace is built without an account, from metrics that training logs."""

import ast
import json
import re
from pathlib import Path

import pytest
import tiny_bundle
import torch

import dashboard
from unclip import bundle
from unclip.clip import recall_at

pytest.importorskip("wandb_workspaces")
TRAINING = Path(__file__).parents[1] / "src" / "unclip" / "training"


def test_the_printed_workspace_has_the_plots(capsys):
    assert dashboard.main(["someone", "--project", "mine", "--print"]) == 0
    spec = capsys.readouterr().out
    found = json.loads(spec)
    assert (found["entity"], found["project"]) == ("someone", "mine")
    assert '"samples"' in spec and "trainer/global_step" in spec
    for metric in ("train/loss_q3", "train/memory_gib", "validation/psnr_gain"):
        assert metric in spec


def losses_of(name):
    """Return the loss and its terms for a batch."""
    recipe = tiny_bundle.recipe(name)
    if name == "decoder":
        recipe["network"]["out_channels"] = 6
        recipe["diffusion"] = {**recipe["diffusion"], "variance": "learned_range"}
    return bundle.build(recipe).loss(tiny_bundle.batch(name))


def logged():
    """Return the metrics that training logs: loss terms, recall, and names in the code."""
    losses = {f"train/{part}" for name in tiny_bundle.NAMES for part in losses_of(name)}
    recall = recall_at(torch.eye(8), torch.eye(8), among=8)
    found = losses | {"validation/loss"} | {f"validation/{name}" for name in recall}
    for path in TRAINING.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "measure":
                dicts = [inner for inner in ast.walk(node) if isinstance(inner, ast.Dict)]
                keys = [key for inner in dicts for key in inner.keys]
                found |= {f"validation/{k.value}" for k in keys if isinstance(k, ast.Constant)}
            elif isinstance(node, ast.Constant):
                found |= set(re.findall(r"^(?:train|validation)/\w+$", str(node.value)))
    return {re.sub(r"_q\d$", "_q", name) for name in found}


def test_all_its_metrics_are_logged():
    names = {
        f"{prefix}/{re.sub(r'_q[0-3]$', '_q', name)}"
        for prefix, plots in dashboard.PLOTS.items()
        for metrics in plots.values()
        for name in metrics
    }
    assert names <= logged()
    assert "validation/images" not in logged()
