"""Stages compared to the bit; the order of a header's keys is nobody's."""

import torch
from safetensors.torch import load_file

from unclip import bundle


def assert_same_stage(one, other, name):
    """The same tensors, recipe and fingerprints in two bundles."""
    paths = [bundle.stage_file(folder, name) for folder in (one, other)]
    assert bundle.read_metadata(paths[0]) == bundle.read_metadata(paths[1])
    first, second = (load_file(path) for path in paths)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key
