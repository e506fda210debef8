import numpy as np
import torch

from unclip.stages.draft import LinearDraft


def test_fit_equals_least_squares_by_numpy():
    draft = LinearDraft(5, 4, ridge=0.0)
    z, pictures = torch.randn(200, 5), torch.rand(200, 3, 4, 4)
    draft.fit(z, pictures)
    inputs = np.concatenate([z.numpy(), np.ones((200, 1))], axis=1)
    solution, *_ = np.linalg.lstsq(inputs, pictures.flatten(1).numpy(), rcond=None)
    np.testing.assert_allclose(draft.weight.numpy(), solution, atol=1e-5)


def test_ridge_shrinks_the_map_to_the_mean_picture():
    draft = LinearDraft(5, 4, ridge=1e9)
    z, pictures = torch.randn(200, 5), torch.rand(200, 3, 4, 4)
    draft.fit(z, pictures)
    torch.testing.assert_close(draft(z[:2], 4), pictures.mean(0).expand(2, -1, -1, -1))


def test_recovers_a_linear_world_at_any_size():
    draft = LinearDraft(5, 4)
    z = torch.randn(5000, 5)
    flat = torch.tanh(torch.randn(5, 3))
    pictures = (z @ flat)[:, :, None, None].expand(-1, -1, 16, 16)  # one colour a picture
    draft.fit(z, draft.shrink(pictures))
    torch.testing.assert_close(draft(z[:3], 16), pictures[:3], atol=2e-2, rtol=2e-2)
