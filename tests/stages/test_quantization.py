import numpy as np
import pytest
import torch

from unclip.stages.quantization import PrincipalComponents, Quantizer


@pytest.fixture
def z():
    """Return data with a different variance in each direction of a rotated basis."""
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    return (torch.randn(500, 6) * 2.0 ** -torch.arange(6)) @ rotation + 3


def test_principal_components_equal_numpys_svd(z):
    pca = PrincipalComponents(6, 4)
    explained = pca.fit(z)
    centered = z.double().numpy() - z.double().numpy().mean(0)
    u, singular, vectors = np.linalg.svd(centered, full_matrices=False)
    variances = singular**2
    np.testing.assert_allclose(explained, variances.cumsum() / variances.sum(), atol=1e-9)
    signs = np.sign((pca.basis.numpy() * vectors[:4].T).sum(0))
    np.testing.assert_allclose(pca.basis.numpy(), vectors[:4].T * signs, atol=1e-5)
    np.testing.assert_allclose(pca(z).numpy(), (u * singular)[:, :4] * signs, atol=1e-4)
    error = (pca.invert(pca(z)) - z).square().sum().item()
    assert error == pytest.approx(variances[4:].sum(), rel=1e-3)


def test_components_do_not_depend_on_the_chunks_and_have_fixed_signs(z, monkeypatch):
    whole, parts = PrincipalComponents(6, 6), PrincipalComponents(6, 6)
    whole.fit(z)
    monkeypatch.setattr("unclip.stages.quantization.CHUNK", 7)
    parts.fit(z)
    torch.testing.assert_close(whole.basis, parts.basis)
    assert (whole.basis.gather(0, whole.basis.abs().argmax(0, keepdim=True)) > 0).all()
    with pytest.raises(ValueError, match="components is 7; it can be 1 to 6"):
        PrincipalComponents(6, 7)


def test_a_number_is_inside_the_bucket_of_its_code():
    values, quantizer = torch.randn(1000, 3) * torch.tensor([0.1, 1.0, 9.0]), Quantizer(3, 16)
    quantizer.fit(values)
    codes = quantizer.encode(values)
    assert codes.min() == 0 and codes.max() == 15
    rows = torch.arange(3)
    low, high = quantizer.edges[rows, codes], quantizer.edges[rows, codes + 1]
    assert ((low <= values) & (values <= high)).all()
    assert ((quantizer.decode(codes) - values).abs() <= high - low).all()
    torch.testing.assert_close(quantizer.encode(quantizer.decode(codes)), codes)


def test_buckets_are_equally_full_and_decode_to_their_median():
    values, quantizer = torch.randn(16_000, 2).exp(), Quantizer(2, 8)
    quantizer.fit(values)
    codes = quantizer.encode(values)
    for row in range(2):
        counts = codes[:, row].bincount(minlength=8)
        assert (counts - 2000).abs().max() <= 2
        for code in range(8):
            inside = values[codes[:, row] == code, row]
            assert quantizer.medians[row, code].item() == pytest.approx(
                inside.median().item(), rel=1e-2
            )


def test_values_out_of_range_get_the_outermost_code_and_a_constant_decodes_to_itself():
    quantizer = Quantizer(1, 4)
    quantizer.fit(torch.arange(4.0)[:, None])
    assert quantizer.encode(torch.tensor([[-9.0], [9.0]])).tolist() == [[0], [3]]
    quantizer.fit(torch.full((4, 1), 5.0))
    assert quantizer.decode(torch.tensor([[0], [3]])).tolist() == [[5.0], [5.0]]


def test_the_first_codes_are_decoded_without_the_others():
    values, quantizer = torch.randn(100, 3), Quantizer(3, 4)
    quantizer.fit(values)
    codes = quantizer.encode(values)
    torch.testing.assert_close(quantizer.decode(codes[:, :2]), quantizer.decode(codes)[:, :2])
