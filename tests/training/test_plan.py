"""What a step takes, planned without memory, against closed forms and a step that was taken."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unclip import bundle
from unclip.training import plan
from unclip.training.muon import Muon
from unclip.training.optim import parameter_groups

sys.path.append(str(Path(__file__).parents[1]))
import tiny_bundle

import plan as script  # src/plan.py

CONFIG = {
    "clip": {
        "embedding_dim": tiny_bundle.EMBEDDING_DIM,
        "text_width": tiny_bundle.TEXT_WIDTH,
        "context_length": tiny_bundle.CONTEXT_LENGTH,
    },
    "data": {"batch_size": 8, "image_size": 64},
}


def recipe(name):
    """With enough width that activations and weights both count."""
    wide = tiny_bundle.recipe(name)
    if name == "decoder":
        wide["network"] |= {"channels": 64, "multipliers": [1, 2], "groups": 8, "patch": 4}
        wide["network"] |= {"attention_levels": [1], "head_width": 32}
    else:
        wide["network"] |= {"width": 128, "layers": 3, "heads": 4}
    return wide


def meta(name):
    with torch.device("meta"):
        return bundle.build(recipe(name))


def test_live_bytes_are_counted_and_forgotten():
    outside = torch.empty(100, device="meta")
    with plan.LiveBytes([outside]) as live:
        view = outside.view(10, 10)
        assert live.now == 0
        first = view * 2
        second = first + 1
        assert live.now == 800
        del first
        assert (live.now, live.peak) == (400, 800)
        mask = second > 0  # a byte each
        assert live.now == 500
        assert second[mask].shape == (1,)


def test_attention_flops():
    attention = plan.AttentionFlops()
    q, k = (torch.empty(2, 3, n, 8, device="meta", requires_grad=True) for n in (5, 7))
    with plan._stand_ins(attention):
        F.scaled_dot_product_attention(q, k, k).sum().backward()
    forward = 4 * 2 * 3 * 5 * 7 * 8
    assert attention.flops == 3 * forward
    assert F.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"


class TwoLayers(nn.Module):
    """As a stage: a loss over two layers without biases."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = (nn.Linear(width, width, bias=False) for _ in range(2))

    def loss(self, batch):
        return {"loss": self.second(self.first(batch["x"]).relu()).sum()}


def test_a_step_in_closed_form():
    with torch.device("meta"):
        step = plan.plan_step(TwoLayers(64), {"x": torch.empty(16, 64)}, averaged=False)
    weights = 2 * 64 * 64
    assert step.parameters == step.trained == weights
    assert (step.weights, step.optimizer, step.average) == (4 * weights, 8 * weights, 0)
    assert step.forward_flops == 2 * 16 * weights
    # Backward twice the forward, but for the gradient of x, which nobody asks for.
    assert step.training_flops == 3 * step.forward_flops - 2 * 16 * 64 * 64
    assert step.peak(devices=4) - step.activations == step.peak() // 4 - step.activations // 4


@pytest.mark.parametrize("name", ["decoder", "prior"])
def test_muon_keeps_the_bytes_of_a_real_step(name):
    planned = plan.plan_step(meta(name), plan.example_batch(CONFIG, meta(name)), muon=True)
    stage = bundle.build(recipe(name))
    optimizer = Muon(
        parameter_groups(stage),
        **{"lr": 1e-3, "muon_lr": 1e-3, "momentum": 0.9, "betas": (0.9, 0.99)},
        **{"weight_decay": 0.0, "muon_weight_decay": 0.0},
    )
    for parameter in stage.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values()]
    assert planned.optimizer == sum(value.nbytes for value in kept if value.ndim)  # no counts
    assert planned.optimizer < plan.MOMENTS * planned.gradients


@pytest.mark.parametrize("name", ["decoder", "prior"])
def test_the_peak_is_that_of_a_real_step(name):
    planned = plan.plan_step(meta(name), plan.example_batch(CONFIG, meta(name)), averaged=False)
    stage = bundle.build(recipe(name)).train()
    batch = {
        key: torch.zeros(value.shape, dtype=value.dtype) if torch.is_tensor(value) else value
        for key, value in plan.example_batch(CONFIG, stage).items()
    }
    batch["text_mask"] += True
    stage.loss(batch)["loss"].backward()  # whatever is made once
    stage.zero_grad(set_to_none=True)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        for parameter in stage.parameters():
            parameter.grad = torch.zeros_like(parameter)  # the last step's
        loss = stage.loss(batch)["loss"]
        stage.zero_grad(set_to_none=True)
        loss.backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    measured = planned.weights + peak
    assert planned.peak() - planned.optimizer == pytest.approx(measured, rel=0.15)
    assert planned.activations > planned.weights / 2  # both parts are tested


def test_checkpointing_keeps_less():
    step = plan.plan_step(meta("decoder"), plan.example_batch(CONFIG, meta("decoder")))
    assert step.checkpointed < 0.7 * step.activations


def test_checkpointing_a_clip_keeps_less():
    deep = tiny_bundle.recipe("clip") | {"vision_layers": 6, "text_layers": 6}
    with torch.device("meta"):
        stage = bundle.build(deep)
    step = plan.plan_step(stage, plan.example_batch(CONFIG, stage))
    assert step.checkpointed < 0.7 * step.activations
    assert not stage.model.visual.transformer.grad_checkpointing  # it was planned on a copy


def test_hours_and_bytes_of_a_run():
    step = plan.StepPlan(10, 10, 100, 300, 40, 40, 80, 40, 1000, 100)
    config = {
        **CONFIG,
        "stage": "decoder",
        "scale": "tiny",
        "trainer": {
            "devices": 4,
            "accumulate_grad_batches": 2,
            "max_steps": 1000,
            "max_steps_multiplier": 0.5,
        },
        "throughput": 64.0,
        "flops": 1e3,
        "mfu": 0.5,
        "sample_bytes": None,
    }
    run = script.plan_run(config, step)
    assert (run.batch, run.steps) == (8 * 4 * 2, 500)
    assert run.hours == pytest.approx(64 * 500 / 64 / 3600)
    assert run.sample_bytes == 0.5 * 64 * 64
    stored = config | {"data": CONFIG["data"] | {"shard_size": 256}}
    assert script.plan_run(stored, step).sample_bytes == 0.5 * 256 * 256
    computed = script.plan_run({**config, "throughput": None}, step)
    assert computed.images_per_second == pytest.approx(4 * 0.5 * 1e3 / (300 / 8))
    text = script.describe(config, step, run)
    assert "sharded over 4" in text
    assert "device-hours" in text
