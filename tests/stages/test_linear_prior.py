import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unclip.stages.linear_prior import LinearPrior, ridge_regression
from unclip.stages.quantization import PrincipalComponents


def test_ridge_regression_equals_least_squares_on_padded_data():
    """Ridge regression is least squares with √ridge · identity as additional rows without bias."""
    x, y = torch.randn(50, 4) + 1, torch.randn(50, 3)
    extra = np.concatenate([np.sqrt(7.0) * np.eye(4), np.zeros((4, 1))], axis=1)
    inputs = np.concatenate([np.concatenate([x.numpy(), np.ones((50, 1))], axis=1), extra])
    targets = np.concatenate([y.numpy(), np.zeros((4, 3))])
    solution, *_ = np.linalg.lstsq(inputs, targets, rcond=None)
    np.testing.assert_allclose(ridge_regression(x, y, 7.0).numpy(), solution, atol=1e-5)


def test_moments_are_summed_in_float64(monkeypatch):
    """The weights are exact to float32 for data far from zero, with any size of the chunks."""
    x, y = torch.randn(5000, 4) + 100, torch.randn(5000, 3) + 100
    inputs = np.pad(x.double().numpy(), [(0, 0), (0, 1)], constant_values=1.0)
    gram = inputs.T @ inputs + np.diag([7.0] * 4 + [0.0])
    expected = np.linalg.solve(gram, inputs.T @ y.double().numpy())
    for chunk in (4096, 7):
        monkeypatch.setattr("unclip.stages.linear_prior.CHUNK", chunk)
        np.testing.assert_allclose(ridge_regression(x, y, 7.0).numpy(), expected, rtol=1e-6)


def test_the_linear_prior_recovers_a_linear_map():
    matrix, z_t = torch.randn(6, 6), torch.randn(4000, 6)
    prior = LinearPrior(6, normalize=False, ridge=0.1)
    prior.fit(z_t, z_t @ matrix + 2)
    torch.testing.assert_close(prior(z_t[:5]), z_t[:5] @ matrix + 2, atol=1e-2, rtol=1e-3)
    prior.normalize = True
    torch.testing.assert_close(prior(z_t).norm(dim=1), torch.ones(4000))


class Products(TorchDispatchMode):
    """Record the dtypes of matrix products."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.dtypes.append(args[-1].dtype)
        return func(*args, **kwargs or {})


def test_statistics_are_applied_in_float64_which_has_neither_autocast_nor_tf32():
    prior, components = LinearPrior(6, normalize=False), PrincipalComponents(6, 4)
    prior.weight.normal_()
    components.basis.normal_()
    calls = (prior, components, lambda z: components.invert(z[:, :4]))
    z = torch.randn(3, 6)
    for call in calls:
        with torch.autocast("cpu", torch.bfloat16), Products() as products:
            products.dtypes = []
            out = call(z)
        assert products.dtypes == [torch.float64]
        assert out.dtype == torch.float32 and torch.equal(out, call(z))
