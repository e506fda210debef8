import copy

import numpy as np
import pytest
import torch

from unclip.stages.draft import Draft


def world(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings, and pictures of one colour that is no linear function of them."""
    z = torch.randn(count, 4)
    colour = torch.stack([z[:, 0] * z[:, 1], z[:, 1].abs(), z[:, 2]], dim=1).tanh()
    return z, colour[:, :, None, None].expand(-1, -1, 16, 16)


def fitted(z: torch.Tensor, pictures: torch.Tensor) -> Draft:
    draft = Draft(4, size=4, width=64, steps=400)
    draft.fit(z, draft.shrink(pictures))
    return draft


def test_learns_what_no_linear_map_can():
    (z, pictures), (unseen, wanted) = world(4000), world(500)
    draft = fitted(z, pictures)
    inputs = np.concatenate([z.numpy(), np.ones((len(z), 1))], axis=1)
    targets = pictures[:, :, 0, 0].numpy()
    linear, *_ = np.linalg.lstsq(inputs, targets, rcond=None)
    error_of_linear = np.square(inputs @ linear - targets).mean()
    assert (draft(unseen, 16) - wanted).square().mean() < 0.05 * error_of_linear


def test_is_the_mean_where_the_embedding_leaves_the_picture_open():
    z = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]).repeat_interleave(200, dim=0)
    black_or_white = torch.tensor([-1.0, 1.0]).repeat(200)
    black_or_white[:150] = 1.0  # of the first embedding's 200 pictures 25 are black
    pictures = black_or_white[:, None, None, None].expand(-1, 3, 8, 8)
    draft = fitted(z, pictures)
    means = pictures[:, 0, 0, 0].view(2, 200).mean(dim=1)
    torch.testing.assert_close(draft(z[[0, -1]], 8)[:, 0, 0, 0], means, atol=0.1, rtol=0)


def test_a_fit_is_a_function_of_weights_and_data_and_leaves_no_gradients():
    z, pictures = world(300)
    first = Draft(4, size=4, width=8, steps=20)
    second, small = copy.deepcopy(first), first.shrink(pictures)
    first.fit(z, small)
    torch.manual_seed(1)
    with torch.no_grad():
        second.fit(z, small)
    assert not list(first.parameters())
    for one, other in zip(first.buffers(), second.buffers(), strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad
        assert one.grad is None


@pytest.mark.parametrize("side", [4, 16, 64])
def test_draws_at_any_size(side):
    assert Draft(4, size=4, width=8, steps=1)(torch.randn(2, 4), side).shape == (2, 3, side, side)
