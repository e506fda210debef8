import numpy as np
import pytest
import torch

from unclip.stages.quantization import PrincipalComponents, Quantizer


def stretched(count: int = 500, dim: int = 6) -> torch.Tensor:
    """Data that varies differently in each of some turned directions."""
    turned, _ = torch.linalg.qr(torch.randn(dim, dim))
    return (torch.randn(count, dim) * 2.0 ** -torch.arange(dim)) @ turned + 3


def test_principal_components_equal_numpy_s_svd():
    z, pca = stretched(), PrincipalComponents(6, 4)
    held = pca.fit(z)
    centred = z.double().numpy() - z.double().numpy().mean(0)
    u, singular, vectors = np.linalg.svd(centred, full_matrices=False)
    variances = singular**2
    np.testing.assert_allclose(held, variances.cumsum() / variances.sum(), atol=1e-9)
    signs = np.sign((pca.basis.numpy() * vectors[:4].T).sum(0))
    np.testing.assert_allclose(pca.basis.numpy(), vectors[:4].T * signs, atol=1e-5)
    np.testing.assert_allclose(pca(z).numpy(), (u * singular)[:, :4] * signs, atol=1e-4)
    left = (pca.invert(pca(z)) - z).square().sum().item()
    assert left == pytest.approx(variances[4:].sum(), rel=1e-3)


def test_moments_do_not_depend_on_the_chunks_or_the_sign(monkeypatch):
    z, whole, parts = stretched(), PrincipalComponents(6, 6), PrincipalComponents(6, 6)
    whole.fit(z)
    monkeypatch.setattr("unclip.stages.quantization.CHUNK", 7)
    parts.fit(z)
    torch.testing.assert_close(whole.basis, parts.basis)
    assert (whole.basis.gather(0, whole.basis.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_first_components_give_the_best_embedding_that_they_can():
    z, pca = stretched(), PrincipalComponents(6, 6)
    pca.fit(z)
    errors = [(pca.invert(pca(z)[:, :k]) - z).square().sum().item() for k in range(7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6
    torch.testing.assert_close(pca.invert(pca(z)[:, :0])[0], z.mean(0))


def test_more_components_than_dimensions():
    with pytest.raises(ValueError, match="components is 7; it can be 1 to 6"):
        PrincipalComponents(6, 7)


def test_a_number_and_its_code_lie_in_one_bucket():
    values, buckets = torch.randn(1000, 3) * torch.tensor([0.1, 1.0, 9.0]), Quantizer(3, 16)
    buckets.fit(values)
    codes = buckets.encode(values)
    assert codes.min() == 0 and codes.max() == 15
    rows = torch.arange(3)
    low, high = buckets.edges[rows, codes], buckets.edges[rows, codes + 1]
    assert ((low <= values) & (values <= high)).all()
    assert ((buckets.decode(codes) - values).abs() <= high - low).all()
    torch.testing.assert_close(buckets.encode(buckets.decode(codes)), codes)


def test_buckets_are_equally_full_and_stand_for_their_median():
    values, buckets = torch.randn(16_000, 2).exp(), Quantizer(2, 8)
    buckets.fit(values)
    codes = buckets.encode(values)
    for row in range(2):
        counts = codes[:, row].bincount(minlength=8)
        assert (counts - 2000).abs().max() <= 2
        for code in range(8):
            inside = values[codes[:, row] == code, row]
            assert buckets.medians[row, code].item() == pytest.approx(
                inside.median().item(), rel=1e-2
            )


def test_what_lies_outside_and_what_is_all_alike():
    buckets = Quantizer(2, 4)
    buckets.fit(torch.tensor([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]))
    assert buckets.encode(torch.tensor([[-9.0, 5.0], [9.0, 6.0]]))[:, 0].tolist() == [0, 3]
    assert buckets.decode(torch.tensor([[0, 0], [3, 3]]))[:, 1].tolist() == [5.0, 5.0]


def test_the_first_few_codes_alone():
    values, buckets = torch.randn(100, 3), Quantizer(3, 4)
    buckets.fit(values)
    codes = buckets.encode(values)
    torch.testing.assert_close(buckets.decode(codes[:, :2]), buckets.decode(codes)[:, :2])
