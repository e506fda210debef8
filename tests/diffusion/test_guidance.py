import pytest
import torch

from unclip.diffusion import guided


def bind(calls):
    """Bind a network whose output is its condition and whose variance is ten times that."""

    def make(value):
        def network(x_t, t):
            calls.append(len(x_t))
            mean = value[:, None, None, None].expand(-1, 3, 4, 4) * (1 + x_t)
            return torch.cat([mean, 10 * mean], dim=1)

        return network

    return make


X, T = torch.randn(2, 3, 4, 4), torch.tensor([7, 7])
COND, NULL = {"value": torch.tensor([2.0, 3.0])}, {"value": torch.tensor([1.0, 1.0])}


def test_guidance_extrapolates_the_mean_and_leaves_the_variance():
    calls = []
    out = guided(bind(calls), COND, NULL, 3.0, channels=3)(X, T)
    mean = (1 + 3 * (COND["value"] - 1))[:, None, None, None] * (1 + X)
    torch.testing.assert_close(out[:, :3], mean)
    torch.testing.assert_close(out[:, 3:], 10 * COND["value"][:, None, None, None] * (1 + X))
    assert calls == [4]  # both halves in one batch


@pytest.mark.parametrize(("scale", "kept"), [(1.0, COND), (0.0, NULL)])
def test_a_half_of_weight_zero_is_not_computed(scale, kept):
    calls = []
    out = guided(bind(calls), COND, NULL, scale)(X, T)
    torch.testing.assert_close(out, bind([])(**kept)(X, T))
    assert calls == [2]
