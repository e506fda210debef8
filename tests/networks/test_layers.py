import pytest
import torch
from torch import nn

from unclip.networks.layers import GroupNorm, attend


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


def test_attention_of_bfloat16_on_a_cpu_is_that_of_float32_rounded():
    q, k, v = (torch.randn(2, 2, length, 8).bfloat16().requires_grad_() for length in (5, 7, 7))
    mask = torch.arange(7).expand(2, 1, 1, 7) < torch.tensor([7, 4]).view(2, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v, mask)
    logits = (q.float() @ k.float().mT / 8**0.5).masked_fill(~mask, -torch.inf)
    expected = (logits.softmax(-1) @ v.float()).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected.bfloat16())
    for gradient, exact in zip(
        torch.autograd.grad(out.float().square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(gradient, exact, rtol=0.05, atol=0.01)
