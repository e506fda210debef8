"""What all stages that are sampled have in common."""

import pytest
import torch
import torch.nn.functional as F
from random_weights import without_gradient
from tiny_stages import (
    decoder,
    embedded_batch,
    prior,
    prior_ar,
    randomized,
    text_encoder,
    train,
    upsampler,
)

STAGES = {
    "prior": prior,
    "prior with a text encoder": lambda: prior(text_encoder=text_encoder(0)),
    "prior with candidates and guidance": lambda: prior(candidates=3, guidance_scale=2.0),
    "prior_ar": prior_ar,
    "prior_ar with candidates and guidance": lambda: prior_ar(candidates=3, guidance_scale=2.0),
    "decoder": decoder,
    "decoder with a text encoder": lambda: decoder(text_encoder=text_encoder(2)),
    "decoder with feature maps": lambda: decoder(feature_maps=True),
    "upsampler": upsampler,
}
all_stages = pytest.mark.parametrize("build", STAGES.values(), ids=STAGES)
both_priors = pytest.mark.parametrize("build", [prior, prior_ar])


@all_stages
def test_the_loss_is_a_scalar_and_reaches_every_parameter(build):
    """Both branches of every drop stay in the graph, or DDP would wait for a missing gradient."""
    stage = randomized(build())
    losses = stage.loss(embedded_batch())
    assert losses["loss"].shape == ()
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]
    losses["loss"].backward()
    assert without_gradient(stage) == []


@all_stages
def test_a_sample_does_not_depend_on_its_batch(build, generators):
    stage = randomized(build())
    condition = stage.condition(embedded_batch())
    together = stage.sample(condition, generators=generators(4))
    assert together.std(dim=0).mean() > 1e-3  # well above the tolerance
    for k in range(4):
        row = {name: value[k : k + 1] for name, value in condition.items()}
        alone = stage.sample(row, generators=generators(1, first_seed=k))
        torch.testing.assert_close(alone[0], together[k], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in STAGES if not name.endswith("guidance")])
def test_training_on_one_batch_lowers_the_loss_by_more_than_half(name):
    losses = train(STAGES[name](), embedded_batch(), steps=60, lr=3e-3)
    assert sum(losses[-10:]) / 10 < 0.5 * sum(losses[:5]) / 5


@both_priors
def test_a_prior_returns_the_candidate_nearest_to_the_text(build, generators):
    stage, batch, calls = randomized(build(candidates=6)), embedded_batch(), []
    options = {"generators": generators(4), "callback": lambda step, steps, z: calls.append(z)}
    best = stage.sample(stage.condition(batch), **options)
    torch.testing.assert_close(best.norm(dim=1), torch.ones(4))
    candidates = calls[-1]
    if build is prior:  # in the network's space
        candidates = F.normalize(stage.image_scaling.denormalize(candidates), dim=2)
    products = (candidates * batch["text_embedding"][:, None]).sum(2)
    torch.testing.assert_close((best * batch["text_embedding"]).sum(1), products.amax(1))
    assert (products.std(dim=1) > 0).all()


@pytest.mark.parametrize("build", [lambda: prior(linear_baseline=True), prior_ar])
def test_a_prior_fits_a_linear_prior(build):
    stage, batch = build(), embedded_batch(500)
    batch["image_embedding"] = batch["text_embedding"].flip(1)
    stage.fit_statistics([batch])
    predicted = stage.linear(stage.condition(batch)["text_embedding"])
    torch.testing.assert_close(predicted, batch["image_embedding"], atol=0.05, rtol=0)


@both_priors
def test_the_null_of_a_prior_has_no_caption(build):
    stage = build()
    condition = stage.condition(embedded_batch())
    null = stage.null(condition)
    assert null.keys() == condition.keys() == {"text_states", "text_mask", "text_embedding"}
    assert (null["text_mask"].sum(1) == 2).all()
