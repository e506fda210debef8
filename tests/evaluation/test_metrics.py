"""Every metric compared with another implementation: scipy, torchmetrics, torch-fidelity."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_bundle
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from unclip.evaluation.features import ClipNetwork, encode_texts
from unclip.evaluation.frechet import Gaussian, bootstrap_error, fit_gaussian, frechet_distance
from unclip.evaluation.measurement import mean_score
from unclip.evaluation.metrics import (
    ClipScore,
    Cmmd,
    Frechet,
    Kernel,
    Manifold,
    RetrievalPrecision,
)


def given(generated, reference=None, *, paired=None, pair=None, texts=None, seed=0):
    """Return a context whose features are given."""
    values = {"features": generated, "reference_features": reference}
    values |= {"paired_features": paired, "real_pair": pair, "texts": texts}
    methods = {name: lambda _, value=value: value for name, value in values.items()}
    prompts = [f"caption {k}" for k in range(len(generated))]
    return SimpleNamespace(**methods, prompts=prompts, seed=seed)


def two_sets(count=300, dim=24, shift=0.3):
    mix = torch.randn(dim, dim)
    return torch.randn(count, dim) @ mix + shift, torch.randn(count + 50, dim) @ mix


def test_moments_are_numpys_in_float64():
    features = torch.randn(50, 6) + 1e4
    fitted = fit_gaussian(features)
    values = features.double().numpy()
    assert fitted.mean.dtype == fitted.covariance.dtype == torch.float64
    np.testing.assert_allclose(fitted.mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(fitted.covariance, np.cov(values, rowvar=False), rtol=1e-9)
    for wrong in (torch.zeros(1, 4), torch.full((5, 4), torch.nan)):
        with pytest.raises(ValueError, match="feature"):
            fit_gaussian(wrong)


@pytest.mark.parametrize("count", [200, 10], ids=["full rank", "singular"])
def test_the_distance_is_the_formula_with_scipys_square_root(count):
    linalg = pytest.importorskip("scipy.linalg")
    first = fit_gaussian(torch.randn(count, 16) @ torch.randn(16, 16))
    second = fit_gaussian(torch.randn(count, 16) @ torch.randn(16, 16) + 0.5)
    root = linalg.sqrtm((first.covariance @ second.covariance).numpy())
    traces = first.covariance.trace() + second.covariance.trace()
    expected = float((first.mean - second.mean).square().sum() + traces) - 2 * np.trace(root).real
    tolerance = 1e-9 if count == 200 else 1e-4  # scipy loses digits where the product is singular
    assert frechet_distance(first, second) == pytest.approx(expected, rel=tolerance)
    assert 0 <= frechet_distance(first, first) < 1e-9 * float(traces)


def test_gaussians_with_known_moments():
    """For commuting covariances it is |m1 - m2|² + Σ (s1 - s2)²."""
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    stds = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.5, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    first, second, constant = (
        Gaussian(torch.full((3,), mean).double(), rotation * std.square() @ rotation.T)
        for mean, std in zip((1.0, 3.0, 3.0), stds, strict=True)
    )
    expected = 3 * 2.0**2 + (stds[0] - stds[1]).square().sum().item()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(constant, first) == pytest.approx(3 * 2.0**2 + 5, rel=1e-7)


def test_the_bootstrap_error_is_repeatable_and_shrinks_with_the_sample():
    small = bootstrap_error(torch.randn(50, 4), torch.randn(50, 4), resamples=30)
    first, second = torch.randn(3000, 4), torch.randn(3000, 4)
    large = bootstrap_error(first, second, resamples=30)
    assert large == bootstrap_error(first, second, resamples=30)
    assert 0 < large < small


def test_frechet_is_torch_fidelitys_and_torchmetrics():
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    generated, reference = two_sets()
    score = Frechet(network="inception", resamples=3)(given(generated, reference)).scores["fid"]
    statistics = [
        fidelity.fid_features_to_statistics(rows.double()) for rows in (generated, reference)
    ]
    theirs = fidelity.fid_statistics_to_metric(*statistics, verbose=False)
    assert score.value == pytest.approx(theirs["frechet_inception_distance"], abs=1e-3)

    class Rows(nn.Identity):
        num_features = generated.shape[1]

    metric = FrechetInceptionDistance(feature=Rows())
    metric.update(reference.double(), real=True)
    metric.update(generated.double(), real=False)
    assert score.value == pytest.approx(float(metric.compute()), abs=1e-3)
    assert (score.n, score.n_reference, score.better) == (300, 350, "lower")
    assert score.interval[0] < score.value < score.interval[1]


def test_a_distance_has_that_of_real_images_as_its_baseline():
    generated, reference = two_sets(shift=3.0)
    context = given(generated, reference, pair=(reference[:170], reference[170:]))
    for metric, name in ((Frechet, "fd_x"), (Kernel, "kid_x")):  # only Inception makes a FID
        score = metric(network="x")(context).scores[name]
        assert score.n_real == 170 and abs(score.baseline) < score.value


def test_the_kernel_distance_is_the_closed_form_and_torch_fidelitys():
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    generated, reference = (rows.double() / 5 for rows in two_sets(120, 8, shift=3.0))
    whole = poly_mmd(reference[:120], generated, 3, None, 1.0)  # all of it in one subset
    score = Kernel(network="x", subsets=400)(given(generated, reference)).scores["kid_x"]
    assert score.about["subset_size"] == 60
    assert score.value == pytest.approx(float(whole), rel=0.1)
    theirs = fidelity.kid_features_to_metric(
        generated, reference, kid_subsets=400, kid_subset_size=60, verbose=False
    )
    assert score.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=0.05)


def test_the_kernel_distances_error_is_its_deviation_over_draws():
    metric = Kernel(network="x", subsets=20)
    sets = ((torch.randn(60, 4) + 1, torch.randn(60, 4)) for _ in range(60))
    drawn = [metric(given(*each)).scores["kid_x"] for each in sets]
    deviation = torch.tensor([score.value for score in drawn]).std()
    reported = torch.tensor([score.error for score in drawn]).mean()
    assert reported / deviation == pytest.approx(1, abs=0.2)
    rows = torch.randn(400, 8)
    score = Kernel(network="x")(given(rows[:200], rows[200:])).scores["kid_x"]
    assert abs(score.value) < 3 * score.error  # of one distribution


def test_draws_are_repeatable_and_leave_the_random_state_alone():
    generated, reference = two_sets(60, 6)
    before = torch.get_rng_state()
    for metric in (Kernel(network="x"), Frechet(network="x"), Cmmd(network="x")):
        first, second = (metric(given(generated, reference, seed=4)).scores for _ in range(2))
        assert first == second
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("neighbors", [3, 5])
def test_precision_and_recall_are_torch_fidelitys(neighbors):
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    generated, reference = two_sets(150, 4, shift=1.0)
    scores = Manifold(network="x", neighbors=neighbors)(given(generated, reference)).scores
    precision, recall = fidelity.calculate_precision_recall_full(
        generated.double(), reference.double(), neighbors
    )
    assert scores["precision_x"].value == pytest.approx(precision, abs=1e-6)
    assert scores["recall_x"].value == pytest.approx(recall, abs=1e-6)


def test_density_and_coverage_of_points_on_a_line():
    """Real images at 0, 1, 2, 3, their balls (k = 1) of radius 1; generated ones at 0.5, 9, 9."""
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    generated = torch.tensor([[0.5], [9.0], [9.0]])
    scores = Manifold(network="x", neighbors=1)(given(generated, real)).scores
    assert scores["precision_x"].value == pytest.approx(1 / 3)
    assert scores["density_x"].value == pytest.approx(2 / 3)  # 0.5 is in the balls of 0 and 1
    assert scores["coverage_x"].value == pytest.approx(2 / 4)
    assert scores["recall_x"].value == pytest.approx(4 / 4)  # 0.5's own ball reaches to 9
    with pytest.raises(ValueError, match="3 neighbors"):
        Manifold(network="x")(given(generated, real))


def test_cmmd_is_the_mean_over_all_pairs():
    generated, reference = two_sets(30, 6)
    first, second = (F.normalize(rows.double(), dim=1).numpy() for rows in (generated, reference))

    def kernel(a, b):
        pairs = [math.exp(-np.square(x - y).sum() / 200) for x in a for y in b]
        return sum(pairs) / len(pairs)

    expected = 1000 * (kernel(first, first) + kernel(second, second) - 2 * kernel(first, second))
    score = Cmmd(network="x")(given(generated, reference)).scores["cmmd_x"]
    assert score.value == pytest.approx(expected, rel=1e-9)


def test_clip_score_is_torchmetrics_with_the_same_model():
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update

    torch.manual_seed(0)
    clip = ClipNetwork(tiny_bundle.stage("clip").embedder(), "judge")
    captions = ["a red square", "a blue star", "two dogs"]
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)

    class Model(nn.Module):
        """The CLIP behind torchmetrics' interface."""

        config = None

        def get_image_features(self, pixel_values):
            return clip(pixel_values)

        def get_text_features(self, input_ids, attention_mask):
            return encode_texts(clip.embedder, [captions[int(row[0])] for row in input_ids])

    def processor(*, text=None, images=None, **_):
        if images is not None:
            return {"pixel_values": torch.stack(images)}
        places = torch.tensor([[captions.index(words)] for words in text])
        return {"input_ids": places, "attention_mask": places}

    theirs, count = _clip_score_update(list(images), captions, Model(), processor)
    context = given(clip(images), texts=encode_texts(clip.embedder, captions))
    score = ClipScore(network="judge")(context).scores["clip_score_judge"]
    assert count == 3 and score.value == pytest.approx(float(theirs.mean()), abs=1e-4)
    assert score.rows.tolist() == pytest.approx(theirs.tolist(), abs=1e-4)
    assert score.baseline is None and score.n_reference is None


def test_r_precision_counts_a_caption_among_others():
    texts = torch.eye(12)
    images = texts.clone()
    images[3] = texts[5]  # an image of another caption
    context = given(images, paired=texts, texts=texts)
    score = RetrievalPrecision(network="x", among=12)(context).scores["r_precision_x"]
    assert score.value == pytest.approx(11 / 12) and score.baseline == 1
    assert score.rows.tolist() == [1.0] * 3 + [0.0] + [1.0] * 8
    assert score.about == {"among": 12}


def test_a_mean_has_its_bootstrap_interval():
    rows = torch.randn(4000)
    score = mean_score(rows, seed=0)
    assert score.error == pytest.approx(float(rows.std()) / 4000**0.5, rel=0.1)
    low, high = score.interval
    assert high - low == pytest.approx(2 * 1.96 * score.error, rel=0.1)
    assert low < score.value < high
