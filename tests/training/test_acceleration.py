"""Gradient checkpointing and compilation change neither names nor numbers."""

import functools

import pytest
import tiny_bundle
import torch
from torch import nn

from unclip.networks.unet import ResBlock
from unclip.training.acceleration import optimize


def learning(name, **options):
    """Returns a stage with fixed weights and noise, its loss and its gradients."""
    torch.manual_seed(0)
    stage = tiny_bundle.stage(name)
    names = list(stage.state_dict())
    optimize(stage, **options)
    assert list(stage.state_dict()) == names
    torch.manual_seed(1)
    loss = stage.train().loss(tiny_bundle.batch(name))["loss"]
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in stage.named_parameters() if p.grad is not None}
    return stage, loss.detach(), gradients


@pytest.mark.parametrize("name", ["clip", "prior", "decoder", "upsampler_256"])
def test_checkpointing_does_not_change_the_gradients(name):
    _, loss, gradients = learning(name)
    _, again, same = learning(name, gradient_checkpointing=True)
    assert torch.equal(loss, again)
    torch.testing.assert_close(same, gradients)


def test_checkpointing_recomputes_blocks_in_the_backward_pass():
    """A convolution of a block runs a second time in the backward pass."""
    stage, calls = tiny_bundle.stage("upsampler_256"), []
    block = next(module for module in stage.modules() if isinstance(module, ResBlock))
    convolution = next(module for module in block.modules() if isinstance(module, nn.Conv2d))
    convolution.register_forward_hook(lambda *_: calls.append(1))
    optimize(stage, gradient_checkpointing=True)
    loss = stage.loss(tiny_bundle.batch("upsampler_256"))["loss"]
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2
    with torch.no_grad():
        stage.loss(tiny_bundle.batch("upsampler_256"))
    assert len(calls) == 3


@pytest.fixture
def graphs(monkeypatch):
    """Only the front end of the compiler runs; the list receives a graph per compilation."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return graphs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("prior", {}),
        ("prior_ar", {"gradient_checkpointing": True}),
        ("decoder", {"gradient_checkpointing": True}),
        ("decoder", {"sharded": True}),
        ("upsampler_256", {}),
    ],
)
def test_a_network_is_one_graph_in_training_and_none_in_validation(name, options, graphs):
    """A break of the graph would be an error. Each block of a sharded stage is a graph."""
    _, loss, gradients = learning(name)
    stage, again, same = learning(name, compile=True, **options)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(same, gradients)
    batch = tiny_bundle.batch(name)
    stage.loss(batch)["loss"].backward()
    with torch.no_grad():
        smaller = {key: value[:1] for key, value in batch.items()}
        stage.eval().loss(smaller)
        generators = [torch.Generator().manual_seed(0)]
        stage.sample(stage.condition(smaller), generators=generators)
    assert (len(graphs) > 1) == ("sharded" in options)


@pytest.mark.parametrize("name", ["clip", "prior", "decoder"])
def test_auto_compiles_networks_on_a_gpu_only(name, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda forward, **_: calls.append(forward))
    optimize(tiny_bundle.stage(name), compile="auto", device="cpu")
    assert not calls
    optimize(tiny_bundle.stage(name), compile="auto", device="cuda")
    assert len(calls) == (0 if name == "clip" else 1)


def test_a_stage_without_a_compilable_network_is_refused():
    with pytest.raises(ValueError, match="clip has no network"):
        optimize(tiny_bundle.stage("clip"), compile=True)
