"""`scale=karlo` builds networks with the parameter counts of Karlo's own classes."""

import pytest
import torch

import convert
from unclip import bundle


def parameters(*modules) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.fixture
def stage():
    def build(name):
        with torch.device("meta"):
            return bundle.build(convert.karlo_recipe(name))

    return build


def test_clip(stage):
    model = stage("clip").model
    vision = parameters(model.visual)
    assert vision == 303_966_208
    assert parameters(model) - vision - model.logit_scale.numel() == 123_650_304


def test_prior(stage):
    assert parameters(stage("prior").network) == 1_022_028_544


def test_decoder(stage):
    decoder = stage("decoder")
    projections = parameters(decoder.network.conditioning) + decoder.null_image_embedding.numel()
    assert projections == 7_878_400
    assert parameters(decoder.network) + decoder.null_image_embedding.numel() == 893_318_086


def test_upsampler(stage):
    upsampler = stage("upsampler_256")
    assert parameters(upsampler.network) == 691_579_523
    assert parameters(upsampler.last_network) == 691_579_523
    trained = [p for p in upsampler.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 691_579_523
