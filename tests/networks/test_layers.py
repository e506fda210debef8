import pytest
import torch
from torch import nn

from unclip.networks.layers import GroupNorm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_of_half_precision_is_that_of_float32_rounded(dtype):
    x = (100 + torch.randn(2, 32, 16, 16)).to(dtype)  # half-precision sums lose such a mean
    x = x.contiguous(memory_format=torch.channels_last)
    expected = nn.GroupNorm(8, 32)(x.float()).to(dtype)
    norm = GroupNorm(8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, expected)
    assert torch.equal(norm.to(dtype)(x), expected)


def test_group_norm_keeps_full_precision():
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(GroupNorm(2, 8).double()(x), nn.GroupNorm(2, 8).double()(x))
