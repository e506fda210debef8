import pytest
import torch

from unclip.diffusion import guided

X, T = torch.randn(2, 3, 4, 4), torch.tensor([7, 7])
COND, NULL = {"value": torch.tensor([2.0, 3.0])}, {"value": torch.tensor([1.0, 1.0])}


def bind_into(batches):
    """Bind a network whose mean is proportional to its condition, and its variance ten times that.

    The network appends the size of each batch to `batches`.
    """

    def bind(value):
        def network(x_t, t):
            batches.append(len(x_t))
            mean = value[:, None, None, None] * (1 + x_t)
            return torch.cat([mean, 10 * mean], dim=1)

        return network

    return bind


def test_guidance_extrapolates_the_mean_and_not_the_variance_or_all_channels():
    batches = []
    out = guided(bind_into(batches), COND, NULL, 3.0, channels=3)(X, T)
    cond, null = (bind_into([])(**condition)(X, T) for condition in (COND, NULL))
    expected = null + 3 * (cond - null)
    torch.testing.assert_close(out, torch.cat([expected[:, :3], cond[:, 3:]], dim=1))
    assert batches == [4]  # both halves in one batch
    torch.testing.assert_close(guided(bind_into([]), COND, NULL, 3.0)(X, T), expected)


@pytest.mark.parametrize(("scale", "kept"), [(1.0, COND), (0.0, NULL)])
def test_a_half_of_weight_zero_is_not_computed(scale, kept):
    batches = []
    out = guided(bind_into(batches), COND, NULL, scale)(X, T)
    torch.testing.assert_close(out, bind_into([])(**kept)(X, T))
    assert batches == [2]
