"""`scale=karlo` builds networks with the parameter counts of Karlo's own classes."""

import torch

import convert
from unclip import bundle


def test_networks_have_their_published_sizes(stage, part, count):
    with torch.device("meta"):
        built = bundle.build(convert.karlo_recipe(stage))
    parameters = list(built.get_submodule(part).parameters())
    assert sum(parameter.numel() for parameter in parameters) == count
    trained = {parameter.requires_grad for parameter in parameters}
    assert trained == {part != "last_network"}
