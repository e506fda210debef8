"""Replacements of torchvision's operators are defined once, and only if they are needed."""

import importlib.machinery
import importlib.util
import subprocess
import sys

import pytest
import torch

from unclip import _torchvision


@pytest.mark.slow
def test_torchvision_imports_after_unclip_in_a_fresh_process():
    code = (
        "import unclip._torchvision as t, torch, torchvision;"
        "print(hasattr(torch.ops.torchvision, 'nms'), t.define_missing_operators())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "[]"]


def test_both_operators_exist_with_the_schema_and_a_second_call_defines_nothing():
    for name in ("nms", "qnms"):
        schema = str(getattr(torch.ops.torchvision, name).default._schema)
        assert "Tensor dets, Tensor scores, float iou_threshold) -> Tensor" in schema
    assert _torchvision.define_missing_operators() == []


def test_without_torchvision_nothing_is_defined(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(_torchvision, "_OPERATORS", ("absent_operator",))
    assert _torchvision.define_missing_operators() == []
    assert not hasattr(torch.ops.torchvision, "absent_operator")


@pytest.mark.parametrize(
    ("library", "defined"), [("whole", []), ("broken", ["trial_broken"]), (None, ["trial_None"])]
)
def test_operators_are_defined_only_if_the_library_does_not_load(
    monkeypatch, tmp_path, library, defined
):
    spec = importlib.machinery.ModuleSpec("torchvision", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(_torchvision, "_OPERATORS", (f"trial_{library}",))
    if library is not None:
        (tmp_path / "_C.so").write_bytes(b"no library")
    if library == "whole":
        monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    assert _torchvision.define_missing_operators() == defined
