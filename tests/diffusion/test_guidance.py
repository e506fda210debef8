import pytest
import torch

from unclip.diffusion import guided, within


def prepare(calls):
    """A network whose output is its condition; the variance is ten times that."""

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
    out = guided(prepare(calls), [(3.0, COND), (-2.0, NULL)], channels=3)(X, T)
    mean = (1 + 3 * (COND["value"] - 1))[:, None, None, None] * (1 + X)
    torch.testing.assert_close(out[:, :3], mean)
    torch.testing.assert_close(out[:, 3:], 10 * COND["value"][:, None, None, None] * (1 + X))
    assert calls == [4]  # both halves in one batch


@pytest.mark.parametrize(("scale", "kept"), [(1.0, COND), (0.0, NULL)])
def test_a_half_of_weight_zero_is_not_computed(scale, kept):
    calls = []
    out = guided(prepare(calls), [(scale, COND), (1 - scale, NULL)])(X, T)
    torch.testing.assert_close(out, prepare([])(**kept)(X, T))
    assert calls == [2]


def test_two_scales_are_a_sum_of_two_guidances():
    """null + s_image (image - null) + s_text (full - image), Brooks et al. 2023, eq. 3."""
    image = {"value": torch.tensor([1.5, 2.5])}
    branches = [(4.0, COND), (2.0 - 4.0, image), (1 - 2.0, NULL)]
    calls = []
    out = guided(prepare(calls), branches, channels=3)(X, T)[:, :3]
    value = NULL["value"] + 2 * (image["value"] - NULL["value"])
    value = value + 4 * (COND["value"] - image["value"])
    torch.testing.assert_close(out, value[:, None, None, None] * (1 + X))
    assert calls == [6]


def test_full_rescale_restores_the_conditional_s_deviation():
    branches = [(5.0, COND), (-4.0, NULL)]
    out = guided(prepare([]), branches, channels=3, rescale=1.0)(X, T)[:, :3]
    plain = prepare([])(**COND)(X, T)[:, :3]
    torch.testing.assert_close(out.flatten(1).std(1), plain.flatten(1).std(1))
    half = guided(prepare([]), branches, channels=3, rescale=0.5)(X, T)[:, :3]
    unscaled = guided(prepare([]), branches, channels=3)(X, T)[:, :3]
    torch.testing.assert_close(half, 0.5 * (out + unscaled))


def test_outside_the_interval_only_the_conditional_half_is_run():
    calls = []
    make = prepare(calls)
    network = within((10, 20), guided(make, [(3.0, COND), (-2.0, NULL)]), make(**COND))
    for t in (9, 10, 20, 21):
        network(X, torch.tensor([t, t]))
    assert calls == [2, 4, 4, 2]
