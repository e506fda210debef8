"""Spelling, and power spectra against closed forms: white noise, a blur's transfer function."""

import math

import pytest
import torch
from tiny_evaluation import configured, scenes_context

from unclip.evaluation import limits
from unclip.evaluation.limits import (
    BANDS,
    WORDS,
    band_power,
    compare,
    load_reader,
    radial_power,
    ratio,
    sign,
    similarity,
)
from unclip.evaluation.measurement import run

SMALL = {
    "spelling": {"words": ["HELLO", "STOP"], "each": 1},
    "detail": {"images": {"64": 4, "256": 2, "1024": 1}, "resamples": 4},
}


@pytest.fixture(scope="module")
def context(small_model, scenes, tmp_path_factory):
    return scenes_context(small_model, scenes, tmp_path_factory.mktemp("out"))


def measured(context, monkeypatch, read):
    monkeypatch.setattr(limits, "load_reader", lambda: read)
    return run(configured("limits", SMALL), context).results


@pytest.mark.filterwarnings("ignore:a prompt is too long")
def test_each_limit_is_next_to_real_images_and_a_second_run_finds_the_samples(context, monkeypatch):
    def read(image):
        """Read HELLO from any black words on white, and nothing from a generated image."""
        return "HELLO" if image.min() == 0 and image.max() == 255 else ""

    found = measured(context, monkeypatch, read)
    words = found["spelling"].values["limits"]["spelling"]["scores"]
    assert words["right"]["real"] == 0.5 and words["right"]["n"] == words["right"]["n_real"] == 2
    detail = found["detail"].values["limits"]["detail"]
    bands = {f"{size}_{band}" for size in (64, 256, 1024) for band in ("low", "middle", "high")}
    assert detail["scores"].keys() == bands and detail["about"]["unit"] == "dB"
    for result in found.values():
        (table,) = result.tables.values()
        assert table.rows and {len(row) for row in table.rows} == {len(table.head)}
    before = {path: path.stat().st_mtime_ns for path in context.out.rglob("*.png")}
    again = measured(context, monkeypatch, read)
    assert len(before) > 7 and again["detail"].values == found["detail"].values
    assert before == {path: path.stat().st_mtime_ns for path in context.out.rglob("*.png")}


def test_a_missing_reader_is_named(context, monkeypatch):
    monkeypatch.setattr(limits, "find_spec", lambda name: None)
    reasons = run({"spelling": configured("limits", SMALL)["spelling"]}, context).not_available
    assert "pip install -e '.[text]'" in reasons["spelling"]


def test_a_network_that_the_package_lacks_is_not_fetched(monkeypatch, tmp_path):
    rapidocr = pytest.importorskip("rapidocr")
    monkeypatch.setattr(rapidocr, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="has no network for Det"):
        load_reader()


def test_similarity_ignores_case_and_spaces():
    pairs = {
        ("Deep Learning", "deeplearning"): 1,
        ("", "STOP"): 0,
        ("SHOP", "STOP"): 0.75,
        ("STOPSTOP", "STOP"): 0.5,
        ("", ""): 1,
        ("kitten", "sitting"): 1 - 3 / 7,
        ("intention", "execution"): 1 - 5 / 9,
        ("ab", "ba"): 0,
    }
    assert similarity(*zip(*pairs, strict=True)).tolist() == pytest.approx(list(pairs.values()))


@pytest.mark.parametrize("size", [64, 256])
def test_a_sign_holds_its_words_whole(size):
    for words in ("I", *WORDS):
        dark = sign(words, size).float().mean(dim=0) < 128
        edge = size // 32
        assert dark[edge:-edge, edge:-edge].sum() == dark.sum() > 0


def test_the_reader_reads_what_a_font_draws_and_nothing_in_an_empty_image():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    read = load_reader()
    assert read(sign("HELLO", 256)) == "HELLO"
    assert read(torch.full((3, 64, 64), 255, dtype=torch.uint8)) == ""


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
        mean = float(band_power(radial_power(images), band).mean())
        assert mean == pytest.approx(sigma**2, rel=0.03)


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


def test_a_sine_has_its_power_in_its_own_ring_and_color_counts_by_its_luminance():
    size, cycles = 64, 12
    wave = 0.3 * torch.sin(2 * math.pi * cycles * torch.arange(size) / size)
    whole = gray(0.5 + wave.expand(1, size, size))
    power = radial_power(whole)[0]
    assert power.argmax() == cycles
    assert power[cycles - 4] + power[cycles + 4] < 1e-3 * power[cycles]
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        image = torch.full((1, 3, size, size), 128, dtype=torch.uint8)
        image[:, channel] = whole[:, 0]
        found = radial_power(image)[0, cycles] / power[cycles]
        assert float(found) == pytest.approx(weight**2, rel=0.02)


def test_two_halves_of_one_set_differ_only_by_chance():
    assert float(ratio(torch.tensor([1.0, 3.0]), torch.tensor([0.2]))) == pytest.approx(10.0)
    power = radial_power(gray(0.5 + 0.1 * torch.randn(40, 64, 64)))
    score = compare(power, power, resamples=50)["middle"]
    assert score.value == 0 and score.interval[0] < 0 < score.interval[1]
    assert abs(score.baseline) < 0.5 and (score.n, score.n_reference, score.n_real) == (40, 40, 20)
    assert compare(power[:1], power[:1], resamples=2)["low"].baseline is None
