import itertools

import pytest
import torch
import torch.nn.functional as F

from unclip.networks.ar_transformer import ARTransformer
from unclip.stages.prior_ar import AutoregressivePriorStage, nucleus, sample_code

D, W, L, B = 8, 12, 5, 16
pytestmark = pytest.mark.filterwarnings("ignore:. components keep")


def embedded_batch(count: int = 4) -> dict:
    return {
        "caption": ["a red apple"] * count,
        "image_embedding": F.normalize(torch.randn(count, D), dim=1),
        "text_embedding": F.normalize(torch.randn(count, D), dim=1),
        "text_states": torch.randn(count, L, W),
        "text_mask": torch.arange(L)[None].expand(count, -1) < 4,
    }


def prior(components: int = D, buckets: int = B, **options) -> AutoregressivePriorStage:
    """Fitted; its dimensions vary alike, so that fewer components than D lose something."""
    network = ARTransformer(
        embedding_dim=D,
        text_width=W,
        context_length=L,
        components=components,
        buckets=buckets,
        width=16,
        layers=2,
        heads=2,
    )
    stage = AutoregressivePriorStage(network, text_width=W, **options)
    stage.fit_statistics([embedded_batch(300), embedded_batch(200)])
    return stage


def shaken(stage: AutoregressivePriorStage) -> AutoregressivePriorStage:
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return stage.eval()


def recorded(stage: AutoregressivePriorStage, **settings) -> list[torch.Tensor]:
    """The codes that each evaluation of the network was given while sampling."""
    given = []
    whole = stage.network.decoder

    def decoder(prefix, copies):
        next_logits = whole(prefix, copies)
        return lambda codes: given.append(codes) or next_logits(codes)

    stage.network.decoder = decoder
    stage.sample(**settings)
    del stage.network.decoder
    return given


class TestLoss:
    def test_is_a_scalar_and_reaches_every_parameter(self):
        stage = prior()
        stage.loss(embedded_batch())["loss"].backward()
        assert [name for name, p in stage.named_parameters() if p.grad is None] == []

    def test_is_the_likelihood_that_sampling_draws_from(self):
        """With no caption dropped, every sequence's exp(-K loss), weighed, sums to one."""
        stage = shaken(prior(components=2, buckets=4, drop_text=0.0, normalize=False))
        one = {name: value[:1] for name, value in embedded_batch().items()}
        stage.dot_product_quantizer.edges.fill_(10.0)  # the same code whatever z_i is
        total = 0.0
        for codes in itertools.product(range(4), repeat=2):
            values = stage.quantizer.decode(torch.tensor([codes]))
            z = stage.components.invert(values)
            assert stage.encode(z).tolist() == [list(codes)]
            loss = stage.loss({**one, "image_embedding": z})["loss"]
            total += torch.exp(-2 * loss.double()).item()
        assert total == pytest.approx(1.0, abs=1e-5)

    def test_drops_the_caption_and_keeps_the_dot_product(self):
        stage, batch = shaken(prior(drop_text=1.0)), embedded_batch()
        other = {**batch, "text_states": torch.randn(4, L, W)}
        torch.testing.assert_close(stage.loss(batch), stage.loss(other))
        # z_t reaches the loss through z_i · z_t alone
        flipped = {**batch, "image_embedding": batch["image_embedding"].clone()}
        flipped["text_embedding"] = -batch["text_embedding"]
        assert stage.loss(flipped)["loss"] != stage.loss(batch)["loss"]


class TestSample:
    @pytest.mark.parametrize("options", [{}, {"candidates": 3, "guidance_scale": 2.0}])
    def test_does_not_depend_on_its_batch(self, options, generators):
        stage = shaken(prior(**options))
        condition = stage.condition(embedded_batch())
        together = stage.sample(condition, generators=generators(4))
        torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
        assert (together.std(dim=0) > 0.05).all()
        for k in range(4):
            row = {name: value[k : k + 1] for name, value in condition.items()}
            alone = stage.sample(row, generators=generators(1, first_seed=k))
            torch.testing.assert_close(alone[0], together[k])

    def test_guidance_at_scale_one_skips_the_null_half(self, generators):
        stage = shaken(prior())
        settings = {"condition": stage.condition(embedded_batch()), "generators": generators(4)}
        assert {len(codes) for codes in recorded(stage, **settings)} == {4}
        assert {len(codes) for codes in recorded(stage, guidance_scale=2.0, **settings)} == {8}

    def test_guidance_extrapolates_logits(self, generators, monkeypatch):
        """The first code's logits at scale 3 are null + 3 (caption - null)."""
        stage, batch = shaken(prior()), embedded_batch()
        condition = stage.condition(batch)

        def first_logits(condition, scale):
            seen = []
            monkeypatch.setattr(
                "unclip.stages.prior_ar.sample_code",
                lambda logits, *rest: seen.append(logits) or sample_code(logits, *rest),
            )
            stage.sample(condition, generators=generators(4), guidance_scale=scale)
            return seen[0]

        cond, null = first_logits(condition, 1.0), first_logits(stage.null(condition), 1.0)
        expected = null + 3 * (cond - null)
        torch.testing.assert_close(first_logits(condition, 3.0), expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("lowest", [0.5, 0.85])
    def test_the_target_dot_product_is_from_the_upper_part(self, lowest, generators):
        stage = shaken(prior(min_dot_product_percentile=lowest))
        condition = stage.condition(embedded_batch(200))
        asked = recorded(stage, condition=condition, generators=generators(200))[0]
        assert asked.min() == int(lowest * B) and asked.max() == B - 1
        share = (asked >= B - 2).float().mean().item()  # buckets are equally full
        assert share == pytest.approx(2 / B / (1 - lowest), abs=0.1)

    def test_keeps_the_candidate_nearest_to_the_text(self, generators):
        stage, batch = shaken(prior(candidates=6)), embedded_batch()
        condition = stage.condition(batch)
        kept = stage.sample(condition, generators=generators(4))
        seen = []
        stage.sample(
            condition, generators=generators(4), callback=lambda step, steps, z: seen.append(z)
        )
        products = (seen[-1] * batch["text_embedding"][:, None]).sum(2)
        torch.testing.assert_close((kept * batch["text_embedding"]).sum(1), products.amax(1))
        assert (products.std(dim=1) > 0).all()

    def test_tells_of_each_component_and_takes_no_steps(self, generators):
        stage, calls = shaken(prior(components=4)), []
        condition = stage.condition(embedded_batch())
        stage.sample(
            condition, generators=generators(4), callback=lambda *call: calls.append(call[:2])
        )
        assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
        with pytest.raises(ValueError, match="prior_ar takes no steps"):
            stage.sample(condition, generators=generators(4), steps=3)

    def test_a_low_temperature_takes_the_likeliest_codes(self, generators):
        stage = shaken(prior(temperature=1e-4, min_dot_product_percentile=1 - 1 / B))
        condition = stage.condition(embedded_batch())
        first = stage.sample(condition, generators=generators(4))
        torch.testing.assert_close(
            stage.sample(condition, generators=generators(4, first_seed=9)), first
        )


class TestDrawing:
    def test_frequencies_are_the_probabilities(self):
        logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
        chance = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        codes = sample_code(logits.expand(20_000, -1), chance, 1.0)
        shares = codes.bincount(minlength=4) / 20_000
        torch.testing.assert_close(shares, logits.softmax(0), atol=1e-4, rtol=0)

    @pytest.mark.parametrize(
        ("mass", "kept"),
        [(0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 2, 3]), (1.0, [0, 1, 2, 3])],
    )
    def test_top_p_keeps_exactly_the_nucleus(self, mass, kept):
        probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
        left = nucleus(probabilities, mass)
        assert left[0].nonzero().flatten().tolist() == kept
        assert torch.equal(left[0, kept], probabilities[0, kept])
        chance = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
        drawn = sample_code(probabilities.log().expand(1000, -1), chance, mass)
        assert drawn.unique().tolist() == kept

    def test_the_ends_of_chance_stay_within_the_nucleus(self):
        logits = torch.tensor([[-9.0, 5.0, 5.0, -9.0]]).expand(2, -1)
        ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
        assert sample_code(logits, ends, 0.9).tolist() == [1, 2]

    @pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}])
    def test_settings_that_make_no_sense(self, wrong):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            prior(**wrong)


def test_fit_statistics_says_how_many_components_hold_99_percent():
    with pytest.warns(UserWarning, match=r"4 components explain 5\d\.\d% .* network.components=8"):
        prior(components=4)


def test_codes_say_nearly_all_there_is_to_an_embedding():
    stage, z = prior(buckets=256), embedded_batch(50)["image_embedding"]
    assert F.cosine_similarity(stage.decode(stage.encode(z)), z).min() > 0.99


def test_the_linear_map_is_fitted_too():
    stage = prior()
    batch = embedded_batch(500)
    batch["image_embedding"] = batch["text_embedding"].roll(1, dims=1)
    stage.fit_statistics([batch])
    predicted = stage.linear(stage.condition(batch)["text_embedding"])
    assert F.cosine_similarity(predicted, batch["image_embedding"]).mean() > 0.99


def test_learns_a_handful_of_pairs_by_heart(generators):
    """Then a caption's sample is its picture's embedding, and not another's."""
    batch = embedded_batch(5)
    batch["text_embedding"] = batch["image_embedding"]  # the largest dot product, and so asked for
    stage = prior(drop_text=0.0, min_dot_product_percentile=1 - 1 / B)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-2)
    for _ in range(150):
        loss = stage.loss(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sampled = stage.eval().sample(stage.condition(batch), generators=generators(5))
    true = stage.decode(stage.encode(batch["image_embedding"]))
    cosines = F.cosine_similarity(sampled[:, None], true[None], dim=2)
    assert cosines.argmax(dim=1).tolist() == [0, 1, 2, 3, 4]
    assert cosines.diagonal().mean() > 0.95
