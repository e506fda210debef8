"""`scale=karlo` builds networks with the parameter counts of Karlo's own classes."""

import pytest
import torch

import convert
from unclip import bundle


@pytest.mark.parametrize(
    ("stage", "part", "count"),
    [
        ("clip", "model.visual", 303_966_208),
        ("clip", "model", 303_966_208 + 123_650_304 + 1),  # and the logit scale
        ("prior", "network", 1_022_028_544),
        ("decoder", "network.conditioning", 7_878_400 - 768),  # the stage has the null embedding
        ("decoder", "network", 893_318_086 - 768),
        ("upsampler_256", "network", 691_579_523),
        ("upsampler_256", "last_network", 691_579_523),
    ],
)
def test_networks_have_their_published_sizes(stage, part, count):
    with torch.device("meta"):
        built = bundle.build(convert.karlo_recipe(stage))
    parameters = list(built.get_submodule(part).parameters())
    assert sum(parameter.numel() for parameter in parameters) == count
    assert {parameter.requires_grad for parameter in parameters} == {part != "last_network"}
