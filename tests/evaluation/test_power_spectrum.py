"""Power spectra against closed forms: white noise, a blur's transfer function, a sine."""

import math

import pytest
import torch

from unclip.evaluation.limits import (
    BANDS,
    band_power,
    compare,
    plot,
    radial_power,
    ratio,
)


def gray(values):
    """Return values in [0, 1] as uint8 in three equal channels."""
    return values.mul(255).round().clamp(0, 255).byte()[:, None].expand(-1, 3, -1, -1)


def test_white_noise_has_its_variance_at_every_radius():
    sigma, size = 0.1, 64
    images = gray(0.5 + sigma * torch.randn(200, size, size))
    power = radial_power(images).mean(dim=0)
    assert power.shape == (33,)
    # The mean is subtracted, so radius 0 is nearly empty; the window spreads that to radius 1.
    assert power[3:].numpy() == pytest.approx(sigma**2 + 1 / 12 / 255**2, rel=0.1)
    for band in BANDS.values():
        assert float(band_power(radial_power(images), band).mean()) == pytest.approx(
            sigma**2, rel=0.03
        )


def test_a_gaussian_blur_multiplies_the_power_by_its_transfer_function():
    """The power is multiplied by exp(−4 π² σ² f²)."""
    size, sigma = 64, 0.8
    frequency = torch.fft.fftfreq(size, dtype=torch.float64)
    radius = (frequency[:, None].square() + frequency.square()).sqrt()
    transfer = torch.exp(-2 * math.pi**2 * sigma**2 * radius.square())
    noise = torch.randn(60, size, size, dtype=torch.float64)
    blurred = torch.fft.ifft2(torch.fft.fft2(noise) * transfer).real
    before, after = (radial_power(gray(0.5 + 0.12 * x)) for x in (noise, blurred))
    scores = compare(after, before, resamples=20)
    for name, (low, high) in BANDS.items():
        rings = torch.arange(33) / 64
        rings = rings[(rings >= low) & (rings <= high)].double()
        kept = torch.exp(-4 * math.pi**2 * sigma**2 * rings.square()).mean()
        assert scores[name].value == pytest.approx(10 * math.log10(kept), abs=0.3)
    assert scores["low"].value > -2 and scores["high"].value < -8


def test_a_sine_has_its_power_in_its_own_ring():
    size, cycles, height = 64, 12, 0.3
    x = torch.arange(size) / size
    wave = 0.5 + height * torch.sin(2 * math.pi * cycles * x)
    power = radial_power(gray(wave.expand(1, size, size)))[0]
    assert power.argmax() == cycles
    assert power[cycles - 4] + power[cycles + 4] < 1e-3 * power[cycles]


def test_color_counts_by_its_luminance():
    noise = 0.5 + 0.1 * torch.randn(50, 64, 64)
    only = torch.full((50, 3, 64, 64), 128, dtype=torch.uint8)
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        images = only.clone()
        images[:, channel] = gray(noise)[:, 0]
        found = radial_power(images)[:, 5:].mean() / radial_power(gray(noise))[:, 5:].mean()
        assert float(found) == pytest.approx(weight**2, rel=0.02)


def test_two_halves_of_one_set_differ_only_by_chance():
    assert float(ratio(torch.tensor([1.0, 3.0]), torch.tensor([0.2]))) == pytest.approx(10.0)
    power = radial_power(gray(0.5 + 0.1 * torch.randn(40, 64, 64)))
    score = compare(power, power, resamples=50)["middle"]
    assert score.value == 0 and score.interval[0] < 0 < score.interval[1]
    assert abs(score.baseline) < 0.5 and (score.n, score.n_reference, score.n_real) == (40, 40, 20)
    assert compare(power[:1], power[:1], resamples=2)["low"].baseline is None


def test_the_plot_of_black_images_is_an_image():
    power = radial_power(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert plot({64: (power, power)}).size == (484, 572)
