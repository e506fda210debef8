"""Compare the stages of two bundles."""

import torch
from safetensors.torch import load_file

from unclip import bundle


def assert_same_stage(one, other, name):
    """Assert that two bundles have the same tensors, recipe and fingerprints of a stage."""
    paths = [bundle.stage_file(folder, name) for folder in (one, other)]
    assert bundle.read_metadata(paths[0]) == bundle.read_metadata(paths[1])
    first, second = (load_file(path) for path in paths)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key
