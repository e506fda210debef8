import itertools
import math
import time

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.data.degradations import _blur, bsr, downsize, gaussian_blur, gaussian_kernel

MILD = {"noise": (0.0, 0.0), "jpeg_quality": (100, 100)}


def noise(size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=generator)


def constant(color=(200, 30, 90), size: int = 64) -> torch.Tensor:
    return torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, size, size).clone()


def test_blur_of_a_point_is_the_closed_form():
    image = torch.zeros(3, 36, 36, dtype=torch.uint8)
    image[0, 16:20, 16:20] = 255  # one pixel of the small image
    edge = math.exp(-1 / (2 * 0.6**2))
    kernel = torch.tensor([[edge**2, edge, edge**2], [edge, 1, edge], [edge**2, edge, edge**2]])
    kernel /= (1 + 2 * edge) ** 2
    assert torch.allclose(gaussian_kernel(3, 0.6), kernel, rtol=1e-6)
    expected = torch.zeros(3, 9, 9)
    expected[0, 3:6, 3:6] = 255 * kernel
    assert (gaussian_blur(image, probability=1).float() - expected).abs().max() <= 0.5


def test_downsizing_averages_and_keeps_the_mean():
    image = noise()
    low_res = gaussian_blur(image, probability=0)
    averages = image.double().unflatten(2, (16, 4)).unflatten(1, (16, 4)).mean((2, 4))
    assert low_res.shape == (3, 16, 16) and low_res.dtype == torch.uint8
    assert (low_res.double() - averages).abs().max() <= 0.5 + 1e-4
    assert (low_res.double().mean((1, 2)) - image.double().mean((1, 2))).abs().max() < 0.15


def test_half_of_the_images_are_blurred():
    image = noise()
    sharp, blurred = (gaussian_blur(image, probability=chance) for chance in (0, 1))
    made = [gaussian_blur(image, seed=seed) for seed in range(200)]
    assert all(torch.equal(low_res, sharp) or torch.equal(low_res, blurred) for low_res in made)
    assert 75 < sum(torch.equal(low_res, sharp) for low_res in made) < 125


@pytest.mark.parametrize("color", [(200, 30, 90), (0, 0, 0), (255, 255, 255)])
def test_constant_images_stay_constant(color):
    image, small = constant(color), constant(color, 16)
    assert torch.equal(gaussian_blur(image), small)
    for seed in range(8):
        assert torch.equal(bsr(image, seed=seed, **MILD), small)
        difference = bsr(image, seed=seed).double().mean((1, 2)) - small.double().mean((1, 2))
        assert difference.abs().max() < 3  # with noise and JPEG


def test_bsr_is_a_function_of_image_and_seed():
    image = noise()
    before = image.clone()
    results = [bsr(image, seed=seed) for seed in range(6)]
    torch.manual_seed(1)
    again = [bsr(image, seed=seed) for seed in range(6)]
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    assert len({result.numpy().tobytes() for result in results}) == 6
    assert torch.equal(image, before)
    assert all(result.shape == (3, 16, 16) and result.dtype == torch.uint8 for result in results)


def test_bsr_degrades_more_with_stronger_settings():
    rows = torch.linspace(0, 255, 64)[None, :, None].expand(3, 64, 64).round().to(torch.uint8)
    clean = gaussian_blur(rows, probability=0).float()

    def error(**options) -> float:
        made = [bsr(rows, seed=seed, **options).float() for seed in range(8)]
        return sum((low_res - clean).std().item() for low_res in made) / 8

    assert error(**MILD) < error() < error(noise=(20.0, 20.0), jpeg_quality=(20, 30))


@pytest.mark.parametrize(
    ("along", "across", "angle"),
    [(2.0, 2.0, 0.3), (3.0, 1.0, 0.0), (3.0, 1.0, math.pi / 2), (3.0, 1.0, math.pi / 4)],
)
def test_a_blurred_point_is_the_gaussian_of_its_covariance(along, across, angle):
    point = torch.zeros(3, 65, 65)
    point[:, 32, 32] = 1
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    covariance = turn @ torch.diag(torch.tensor([along**2, across**2])) @ turn.T
    offsets = torch.arange(65) - 32.0
    xy = torch.stack(torch.meshgrid(offsets, offsets, indexing="xy"), dim=-1)
    density = torch.einsum("hwi,ij,hwj->hw", xy, covariance.inverse(), xy).mul(-0.5).exp()
    density[(xy.abs() > 3 * max(along, across)).any(dim=-1)] = 0
    expected = (density / density.sum()).expand(3, 65, 65)
    assert torch.allclose(_blur(point, along, across, angle), expected, atol=1e-6)


def test_small_and_oblong_images_are_degraded():
    for seed, degrade in itertools.product(range(10), (gaussian_blur, bsr)):
        assert degrade(noise()[:, :8, :32], seed=seed).shape == (3, 2, 8)
        assert degrade(noise()[:, :4, :4], seed=seed).shape == (3, 1, 1)


@pytest.mark.parametrize("degrade", [gaussian_blur, bsr, downsize])
def test_sides_that_are_no_multiples_of_4_are_errors(degrade):
    with pytest.raises(ValueError, match="downsized 4×"):
        degrade(noise(30))


def test_blur_of_a_small_crop_is_cheap():
    image = noise(64)
    gaussian_blur(image)
    start = time.process_time()
    for _ in range(50):
        gaussian_blur(image)
    assert (time.process_time() - start) / 50 < 0.004  # about 0.15 ms; room for a busy machine


def test_downsizing_is_by_area_or_bicubic_and_keeps_flat_color():
    image = noise(32)
    made = [downsize(image, seed=seed) for seed in range(200)]
    area = image.float().unflatten(2, (8, 4)).unflatten(1, (8, 4)).mean((2, 4)).round()
    by_area = sum(torch.equal(low_res.float(), area) for low_res in made)
    assert 70 < by_area < 130
    assert len({low_res.numpy().tobytes() for low_res in made}) == 2
    pixels = image.permute(1, 2, 0).numpy()
    pillow = torch.from_numpy(np.array(Image.fromarray(pixels).resize((8, 8), Image.BICUBIC)))
    other = next(low_res for low_res in made if not torch.equal(low_res.float(), area))
    assert (other.permute(1, 2, 0).int() - pillow.int()).abs().max() <= 1
    assert all(torch.equal(downsize(constant(), seed=s), constant(size=16)) for s in range(4))
