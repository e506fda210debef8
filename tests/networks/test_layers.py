"""Layers that the networks share."""

import pytest
import torch
from torch import nn

from unclip.networks.layers import GroupNorm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_of_half_precision_is_the_one_of_float32_rounded(dtype):
    torch.manual_seed(0)
    x = (100 + torch.randn(2, 32, 16, 16)).to(dtype)  # a mean that a half-precision sum loses
    x = x.contiguous(memory_format=torch.channels_last)
    reference = nn.GroupNorm(8, 32)(x.float()).to(dtype)
    norm = GroupNorm(8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, reference)
    assert torch.equal(norm.to(dtype)(x), reference)


def test_group_norm_keeps_full_precision():
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(GroupNorm(2, 8).double()(x), nn.GroupNorm(2, 8).double()(x))
