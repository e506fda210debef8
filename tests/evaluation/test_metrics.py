"""Every metric compared with another implementation: scipy, torchmetrics, torch-fidelity."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from given_features import Given
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from unclip.evaluation.measurement import mean_score
from unclip.evaluation.metrics import (
    ClipScore,
    Cmmd,
    Frechet,
    InceptionScore,
    Kernel,
    Manifold,
    RetrievalPrecision,
)


def two_sets(count=300, dim=24, shift=0.3):
    mix = torch.randn(dim, dim)
    return torch.randn(count, dim) @ mix + shift, torch.randn(count + 50, dim) @ mix


def test_frechet_is_scipys_and_torch_fidelitys_and_torchmetrics():
    linalg = pytest.importorskip("scipy.linalg")
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    generated, reference = two_sets()
    score = Frechet(network="inception", resamples=3)(Given(generated, reference)).scores["fid"]
    means = [rows.double().numpy().mean(axis=0) for rows in (generated, reference)]
    spreads = [np.cov(rows.double().numpy(), rowvar=False) for rows in (generated, reference)]
    root = linalg.sqrtm(spreads[0] @ spreads[1])
    expected = np.square(means[0] - means[1]).sum() + np.trace(sum(spreads) - 2 * root.real)
    assert score.value == pytest.approx(expected, abs=1e-3)

    statistics = [
        fidelity.fid_features_to_statistics(rows.double()) for rows in (generated, reference)
    ]
    theirs = fidelity.fid_statistics_to_metric(*statistics, verbose=False)
    assert score.value == pytest.approx(theirs["frechet_inception_distance"], abs=1e-3)

    class Identity(torch.nn.Module):
        num_features = generated.shape[1]

        def forward(self, rows):
            return rows

    metric = FrechetInceptionDistance(feature=Identity())
    metric.update(reference.double(), real=True)
    metric.update(generated.double(), real=False)
    assert score.value == pytest.approx(float(metric.compute()), abs=1e-3)
    assert (score.n, score.n_reference, score.better) == (300, 350, "lower")
    assert score.interval[0] < score.value < score.interval[1]


def test_only_inceptions_features_make_a_fid():
    generated, reference = two_sets(40, 4)
    for metric, word in ((Frechet, "fd_effnet_lite0"), (Kernel, "kid_effnet_lite0")):
        found = metric(network="effnet_lite0")(Given(generated, reference))
        assert found.scores.keys() == {word}


def test_a_distance_has_that_of_real_images_as_its_baseline():
    generated, reference = two_sets(shift=3.0)
    pair = (reference[:170], reference[170:])
    near = Frechet(network="x")(Given(generated, reference, pair=pair)).scores["fd_x"]
    assert near.n_real == 170 and 0 < near.baseline < near.value
    far = Kernel(network="x")(Given(generated, reference, pair=pair)).scores["kid_x"]
    assert abs(far.baseline) < far.value and far.n_real == 170


def test_the_kernel_distance_is_the_closed_form_and_torch_fidelitys():
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    generated, reference = (rows.double() / 5 for rows in two_sets(120, 8, shift=3.0))
    whole = poly_mmd(reference[:120], generated, 3, None, 1.0)  # all of it in one subset
    score = Kernel(network="x", subsets=400)(Given(generated, reference)).scores["kid_x"]
    assert score.about["subset_size"] == 60
    assert score.value == pytest.approx(float(whole), rel=0.1)
    theirs = fidelity.kid_features_to_metric(
        generated, reference, kid_subsets=400, kid_subset_size=60, verbose=False
    )
    assert score.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=0.05)


def test_the_kernel_distance_of_one_distribution_is_nothing():
    rows = torch.randn(400, 8)
    score = Kernel(network="x")(Given(rows[:200], rows[200:])).scores["kid_x"]
    assert abs(score.value) < 3 * score.error


def test_draws_are_repeatable_and_leave_the_random_state_alone():
    generated, reference = two_sets(60, 6)
    before = torch.get_rng_state()
    for metric in (Kernel(network="x"), Frechet(network="x"), Cmmd(network="x")):
        first, second = (metric(Given(generated, reference, seed=4)).scores for _ in range(2))
        assert first == second
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("neighbors", [3, 5])
def test_precision_and_recall_are_torch_fidelitys(neighbors):
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    generated, reference = two_sets(150, 4, shift=1.0)
    scores = Manifold(network="x", neighbors=neighbors)(Given(generated, reference)).scores
    precision, recall = fidelity.calculate_precision_recall_full(
        generated.double(), reference.double(), neighbors
    )
    assert scores["precision_x"].value == pytest.approx(precision, abs=1e-6)
    assert scores["recall_x"].value == pytest.approx(recall, abs=1e-6)


def test_density_and_coverage_of_points_on_a_line():
    """Real images at 0, 1, 2, 3, their balls (k = 1) of radius 1; generated ones at 0.5, 9, 9."""
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    generated = torch.tensor([[0.5], [9.0], [9.0]])
    scores = Manifold(network="x", neighbors=1)(Given(generated, real)).scores
    assert scores["precision_x"].value == pytest.approx(1 / 3)
    assert scores["density_x"].value == pytest.approx(2 / 3)  # 0.5 is in the balls of 0 and 1
    assert scores["coverage_x"].value == pytest.approx(2 / 4)
    assert scores["recall_x"].value == pytest.approx(4 / 4)  # 0.5's own ball reaches to 9


def test_a_collapsed_set_is_precise_and_recalls_nothing():
    real = torch.randn(200, 4)
    scores = Manifold(network="x")(Given(real[:1].expand(50, 4), real)).scores
    assert scores["precision_x"].value == 1 and scores["recall_x"].value < 0.05
    assert scores["coverage_x"].value < 0.1


def test_too_few_images_are_named():
    with pytest.raises(ValueError, match="3 neighbors"):
        Manifold(network="x")(Given(torch.randn(3, 4), torch.randn(50, 4)))


def test_cmmd_is_the_mean_over_all_pairs():
    generated, reference = two_sets(30, 6)
    first, second = (F.normalize(rows.double(), dim=1).numpy() for rows in (generated, reference))

    def kernel(a, b):
        pairs = [math.exp(-np.square(x - y).sum() / 200) for x in a for y in b]
        return sum(pairs) / len(pairs)

    expected = 1000 * (kernel(first, first) + kernel(second, second) - 2 * kernel(first, second))
    score = Cmmd(network="x")(Given(generated, reference)).scores["cmmd_x"]
    assert score.value == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings("ignore:std")  # one split has no spread
def test_the_inception_score_is_torch_fidelitys():
    fidelity = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3 * torch.randn(200, 10)
    score = InceptionScore(splits=1)(Given(logits)).scores["inception_score"]
    theirs = fidelity.isc_features_to_metric(logits, splits=1, shuffle=False)
    assert score.value == pytest.approx(float(theirs["inception_score_mean"]), rel=1e-6)


def test_clip_score_is_a_hundred_times_the_mean_cosine():
    images, texts = torch.randn(6, 8), torch.randn(6, 8)
    score = ClipScore(network="x")(Given(images, texts=texts)).scores["clip_score_x"]
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(images, texts, strict=True)]
    assert score.value == pytest.approx(100 * sum(cosines) / 6, rel=1e-5)
    assert score.rows.tolist() == pytest.approx([100 * cosine for cosine in cosines], rel=1e-5)
    assert score.baseline is None and score.n_reference is None


def test_r_precision_counts_a_caption_among_others():
    texts = torch.eye(12)
    images = texts.clone()
    images[3] = texts[5]  # an image of another caption
    context = Given(images, paired=texts, texts=texts)
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
    assert score.plain().keys() >= {"value", "interval", "n"} and "rows" not in score.plain()


def test_the_kernel_distances_error_is_its_deviation_over_draws():
    metric = Kernel(network="x", subsets=20)
    sets = ((torch.randn(60, 4) + 1, torch.randn(60, 4)) for _ in range(60))
    drawn = [metric(Given(*each)).scores["kid_x"] for each in sets]
    deviation = torch.tensor([score.value for score in drawn]).std()
    reported = torch.tensor([score.error for score in drawn]).mean()
    assert reported / deviation == pytest.approx(1, abs=0.2)
