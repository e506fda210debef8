import itertools

import pytest
import torch
import torch.nn.functional as F
from random_weights import randomize
from tiny_stages import BUCKETS, L, W, embedded_batch, train
from tiny_stages import prior_ar as prior

from unclip.stages.prior_ar import AutoregressivePriorStage, nucleus, sample_code

pytestmark = pytest.mark.filterwarnings("ignore:. components explain")


def randomized(stage: AutoregressivePriorStage) -> AutoregressivePriorStage:
    return randomize(stage, std=0.3)


class TestLoss:
    def test_is_the_negative_log_likelihood_of_a_sequence(self):
        """Without dropping, exp(-K · loss) is a probability: it sums to one over all sequences."""
        stage = randomized(prior(components=2, buckets=4, drop_text=0.0, normalize=False))
        one = {name: value[:1] for name, value in embedded_batch().items()}
        stage.dot_product_quantizer.edges.fill_(10.0)  # the same code for every z_i
        total = 0.0
        for codes in itertools.product(range(4), repeat=2):
            values = stage.quantizer.decode(torch.tensor([codes]))
            z = stage.components.invert(values)
            assert stage.encode(z).tolist() == [list(codes)]
            loss = stage.loss({**one, "image_embedding": z})["loss"]
            total += torch.exp(-2 * loss.double()).item()
        assert total == pytest.approx(1.0, abs=1e-5)

    def test_drops_the_caption_and_keeps_the_dot_product(self):
        stage, batch = randomized(prior(drop_text=1.0)), embedded_batch()
        other = {**batch, "text_states": torch.randn(4, L, W)}
        torch.testing.assert_close(stage.loss(batch), stage.loss(other))
        # z_t reaches the loss only through z_i · z_t
        flipped = {**batch, "text_embedding": -batch["text_embedding"]}
        assert stage.loss(flipped)["loss"] != stage.loss(batch)["loss"]


class TestSample:
    def test_guidance_extrapolates_logits(self, generators, monkeypatch):
        """The first code's logits at scale 3 are null + 3 (caption - null)."""
        stage, batch = randomized(prior()), embedded_batch()
        condition = stage.condition(batch)

        def first_logits(condition, scale):
            calls = []
            monkeypatch.setattr(
                "unclip.stages.prior_ar.sample_code",
                lambda logits, *rest: calls.append(logits) or sample_code(logits, *rest),
            )
            stage.sample(condition, generators=generators(4), guidance_scale=scale)
            return calls[0]

        cond, null = first_logits(condition, 1.0), first_logits(stage.null(condition), 1.0)
        expected = null + 3 * (cond - null)
        torch.testing.assert_close(first_logits(condition, 3.0), expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("lowest", [0.5, 0.85])
    def test_the_target_dot_product_is_above_the_percentile(self, lowest, generators):
        stage = randomized(prior(min_dot_product_percentile=lowest))
        targets, layer = [], stage.network.dot_product_in
        layer.register_forward_hook(lambda _, inputs, __: targets.append(inputs[0]))
        stage.sample(stage.condition(embedded_batch(200)), generators=generators(200))
        (target,) = targets
        assert target.min() == int(lowest * BUCKETS) and target.max() == BUCKETS - 1
        share = (target >= BUCKETS - 2).float().mean().item()  # buckets are equally full
        assert share == pytest.approx(2 / BUCKETS / (1 - lowest), abs=0.1)

    def test_calls_back_after_each_component_and_takes_no_steps(self, generators):
        stage, calls = randomized(prior(components=4)), []
        options = {"generators": generators(4), "callback": lambda *call: calls.append(call[:2])}
        condition = stage.condition(embedded_batch())
        stage.sample(condition, **options)
        assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
        with pytest.raises(ValueError, match="prior_ar takes no steps"):
            stage.sample(condition, steps=3, **options)

    def test_a_low_temperature_samples_the_most_likely_codes(self, generators):
        stage = randomized(prior(temperature=1e-4, min_dot_product_percentile=1 - 1 / BUCKETS))
        condition = stage.condition(embedded_batch())
        first, other = (
            stage.sample(condition, generators=generators(4, first_seed=seed)) for seed in (0, 9)
        )
        torch.testing.assert_close(first, other)


class TestSampleCode:
    def test_frequencies_are_the_probabilities(self):
        logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
        uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        codes = sample_code(logits.expand(20_000, -1), uniform, 1.0)
        shares = codes.bincount(minlength=4) / 20_000
        torch.testing.assert_close(shares, logits.softmax(0), atol=1e-4, rtol=0)

    @pytest.mark.parametrize(
        ("mass", "kept"),
        [(0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 2, 3]), (1.0, [0, 1, 2, 3])],
    )
    def test_top_p_keeps_exactly_the_nucleus(self, mass, kept):
        probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
        remaining = nucleus(probabilities, mass)
        assert remaining[0].nonzero().flatten().tolist() == kept
        assert torch.equal(remaining[0, kept], probabilities[0, kept])
        uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
        codes = sample_code(probabilities.log().expand(1000, -1), uniform, mass)
        assert codes.unique().tolist() == kept

    def test_the_ends_of_the_unit_interval_stay_within_the_nucleus(self):
        logits = torch.tensor([[-9.0, 5.0, 5.0, -9.0]]).expand(2, -1)
        ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
        assert sample_code(logits, ends, 0.9).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.0), ("top_p", 0.0), ("top_p", 1.1), ("min_dot_product_percentile", 1.0)],
)
def test_settings_out_of_range_are_errors(name, value):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        prior(**{name: value})


def test_fit_statistics_warns_if_the_components_explain_too_little():
    with pytest.warns(UserWarning, match=r"4 components explain 5\d\.\d% .* network.components=8"):
        prior(components=4)


def test_codes_of_all_components_reconstruct_an_embedding():
    stage, z = prior(buckets=256), embedded_batch(50)["image_embedding"]
    assert F.cosine_similarity(stage.decode(stage.encode(z)), z).min() > 0.99


def test_after_training_on_five_pairs_each_caption_yields_its_image(generators):
    batch = embedded_batch(5)
    batch["text_embedding"] = batch["image_embedding"]  # the largest dot product is the target
    stage = prior(drop_text=0.0, min_dot_product_percentile=1 - 1 / BUCKETS)
    train(stage, batch, steps=150, lr=1e-2)
    sampled = stage.eval().sample(stage.condition(batch), generators=generators(5))
    true = stage.decode(stage.encode(batch["image_embedding"]))
    cosines = F.cosine_similarity(sampled[:, None], true[None], dim=2)
    assert cosines.argmax(dim=1).tolist() == [0, 1, 2, 3, 4]
    assert cosines.diagonal().mean() > 0.95
