"""The cost of a step, measured on fake tensors, against closed forms and real steps."""

import os
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_bundle
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import plan
from cli import planning, training
from unclip import bundle
from unclip.training import cost
from unclip.training.acceleration import optimize
from unclip.training.optim import Muon, parameter_groups

CONF = Path(__file__).parents[2] / "conf"
CONFIG = {
    "clip": {
        "embedding_dim": tiny_bundle.EMBEDDING_DIM,
        "text_width": tiny_bundle.TEXT_WIDTH,
        "context_length": tiny_bundle.CONTEXT_LENGTH,
    },
    "data": {"batch_size": 8, "image_size": 64},
}
ADAMW = partial(torch.optim.AdamW, lr=1e-3, fused=True)
MUON = partial(
    Muon,
    **{"lr": 1e-3, "muon_lr": 1e-3, "momentum": 0.9, "betas": (0.9, 0.99)},
    **{"weight_decay": 0.0, "muon_weight_decay": 0.0},
)


def recipe(name):
    """A recipe so wide that both activations and weights matter."""
    wide = tiny_bundle.recipe(name)
    if name == "clip":
        return wide | {"vision_layers": 6, "text_layers": 6}
    unet = {"channels": 64, "multipliers": [1, 2], "groups": 8, "patch": 4}
    unet |= {"attention_levels": [1], "head_width": 32}
    wide["network"] |= unet if name == "decoder" else {"width": 128, "layers": 3, "heads": 4}
    return wide


def measured(name, *, checkpointing=False, with_clip=False, **options):
    with FakeTensorMode():
        stage = bundle.build(recipe(name))
        if with_clip:
            options["clip"] = bundle.build(recipe("clip"))
        optimize(stage, gradient_checkpointing=checkpointing)
        options = {"optimizer": ADAMW} | options
        return cost.measure_step(stage, planning.example_batch(CONFIG, stage), **options)


def test_live_bytes_are_counted_and_forgotten():
    with FakeTensorMode():
        outside = torch.empty(100)
        with cost.StepMeter([outside, "not a tensor"]) as live:
            outside.view(10, 10)
            assert live.now == 0
            first = outside * 2
            second = first + 1
            assert live.now == 800
            del first
            assert (live.now, live.peak) == (400, 800)
            mask = second > 0  # one byte each
            assert live.now == 500
            assert second[mask].shape == (1,)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_fused_and_its_flops_are_counted(masked):
    n, m = 500, 700
    with FakeTensorMode():
        q, k = (torch.empty(2, 3, length, 8, requires_grad=True) for length in (n, m))
        mask = torch.ones(2, 1, 1, m, dtype=torch.bool) if masked else None
        with cost.StepMeter([q, k, mask]) as meter:
            out = F.scaled_dot_product_attention(q, k, k, attn_mask=mask)
            forward = meter.flops
            out.sum().backward()
    assert forward == 2 * (2 * 2 * 3 * n * m * 8)
    assert meter.flops == 3.5 * forward  # backward: four products and one repeated
    assert meter.peak < 4 * 2 * 3 * n * m


class TwoLayers(nn.Module):
    """A stage whose loss is that of two layers without biases."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = (nn.Linear(width, width, bias=False) for _ in range(2))

    def loss(self, batch):
        return {"loss": self.second(self.first(batch["x"]).relu()).sum()}


def test_a_step_in_closed_form():
    with FakeTensorMode():
        step = cost.measure_step(TwoLayers(64), {"x": torch.empty(16, 64)}, ADAMW)
    weights = 2 * 64 * 64
    assert step.weights == step.gradients == 4 * weights
    assert step.optimizer == 8 * weights + 4 * 2  # two moments and a step count per matrix
    assert step.forward_flops == 2 * 16 * weights
    # The backward pass costs twice as much, except that the gradient of x is not computed.
    assert step.training_flops == 3 * step.forward_flops - 2 * 16 * 64 * 64
    assert step.clip == step.clip_flops == 0


@pytest.mark.parametrize("name", ["decoder", "prior"])
def test_the_optimizers_bytes_are_those_of_a_real_step(name):
    stage = bundle.build(recipe(name))
    optimizer = MUON(parameter_groups(stage))
    for parameter in stage.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values()]
    step = measured(name, optimizer=MUON)
    assert step.optimizer == sum(value.nbytes for value in kept)
    assert step.optimizer < measured(name).optimizer


def zeros(batch, device="cpu"):
    """Give a batch's tensors values."""
    return {
        key: value.to(device).zero_() if torch.is_tensor(value) else value
        for key, value in batch.items()
    }


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["decoder", "prior"])
def test_the_peak_is_that_of_a_real_step(name, bf16, monkeypatch):
    monkeypatch.setattr("unclip.networks.layers.has_slow_attention", lambda x: False)  # as on a GPU
    step = measured(name, bf16=bf16)
    stage = bundle.build(recipe(name)).train()
    batch = zeros(planning.example_batch(CONFIG, stage))
    batch["text_mask"] += True
    stage.loss(batch)["loss"].backward()  # allocates what is allocated once
    stage.zero_grad(set_to_none=True)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        for parameter in stage.parameters():
            parameter.grad = torch.zeros_like(parameter)  # the last step's
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = stage.loss(batch)["loss"]
        stage.zero_grad(set_to_none=True)
        loss.backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert step.gradients + step.activations == pytest.approx(peak, rel=0.02)
    assert step.activations > step.weights / 2  # both parts are tested


@pytest.mark.parametrize("name", ["decoder", "clip"])
def test_gradient_checkpointing_trades_flops_for_memory(name):
    full, checkpointed = measured(name), measured(name, checkpointing=True)
    assert checkpointed.activations < 0.7 * full.activations
    assert checkpointed.forward_flops == full.forward_flops
    assert full.training_flops < checkpointed.training_flops < 1.4 * full.training_flops


def test_the_frozen_clip_counts():
    clip = bundle.build(recipe("clip"))
    alone, text = measured("prior"), measured("prior", with_clip=True)
    both = measured("prior", with_clip=True, encode_images=True)
    assert text.clip == sum(part.nbytes for part in (*clip.parameters(), *clip.buffers()))
    assert 0 == alone.clip_flops < text.clip_flops < both.clip_flops
    assert text.training_flops == alone.training_flops


@cache
def planned(stage, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = plan._to_dict(compose("plan", [f"stage={stage}", *overrides]))
        return config, plan.measure(config)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["decoder", "prior", "upsampler_256"])
def test_the_planned_memory_is_that_of_a_gpu(name):
    config, step = planned(name, "scale=emoji")
    stage = bundle.build(config["model"]).cuda().train()
    batch = zeros(planning.example_batch(config, stage), "cuda")
    for _ in range(2):  # the gradients of the first step live during the second one
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = stage.loss(batch)["loss"]
        stage.zero_grad(set_to_none=True)
        loss.backward()
    expected = step.weights + step.gradients + step.activations
    assert torch.cuda.max_memory_allocated() == pytest.approx(expected, rel=0.2)


PAPER = {"prior": 64, "upsampler_256": 32}  # numbers of devices


def papers(name):
    return planned(name, "scale=paper", f"trainer.devices={PAPER[name]}")


def test_the_papers_prior_takes_4260_gpu_hours_and_its_clip_a_tenth_more():
    config, step = papers("prior")
    samples = 600_000 * 4096
    hours = step.training_flops / config["data"]["batch_size"] * samples / 300e12 / 3600
    assert hours == pytest.approx(4260, rel=0.01)
    assert step.clip_flops / step.training_flops == pytest.approx(0.09, abs=0.01)
    rows = plan.describe(config, step)
    assert rows["samples"] == f"{samples:,}"
    assert rows["TFLOP/s per device, assumed"] == "300.0 (MFU 30.3%)"
    total = hours * (1 + step.clip_flops / step.training_flops)
    expected = pytest.approx([total, total / 8, total / 64], rel=1e-3)
    assert numbers(rows["  ddp"]) == expected  # the gradients are reduced during the backward pass


def test_bf16_saves_a_quarter_of_a_u_net_s_activations():
    """The group norms compute in float32: autograd saves 16.8 GiB on fake CUDA tensors."""
    _, step = papers("upsampler_256")
    assert step.activations / 2**30 == pytest.approx(17.8, rel=0.03)  # float32: 23.9
    assert step.gradients / 2**30 == pytest.approx(2.7, rel=0.01)


@pytest.mark.parametrize("name", PAPER)
def test_the_documented_costs_are_those_of_the_planner(name):
    config, step = papers(name)
    lines = (CONF.parent / "docs" / "training.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"| paper | {name} |"))
    cells = [cell.strip().replace(",", "") for cell in line.strip("|").split("|")]
    rows = plan.describe(config, step)
    one, eight, *_, most = numbers(rows["  ddp"])  # also on 32 devices
    (samples,) = numbers(rows["samples"])
    tflops = (step.training_flops + step.clip_flops) / config["data"]["batch_size"] / 1e12
    expected = [samples / 1e6, tflops, one, eight, most, numbers(rows["  fsdp"])[-1]]
    expected += [numbers(rows[f"  {k}, GiB per device"])[n] for k, n in (("ddp", 0), ("fsdp", 1))]
    written = [float(cells[index]) for index in (2, 3, 5, 6, 7, 8, 9, 10)]
    assert written == pytest.approx(expected, rel=0.03)


def numbers(row):
    return [float(value.replace(",", "")) for value in row.split()]


def test_fsdp_shards_the_states_but_not_clip_and_activations():
    config, step = papers("prior")
    sharded = config | {"trainer": config["trainer"] | {"strategy": "fsdp"}}
    whole, shards = plan.describe(config, step), plan.describe(sharded, step)
    assert float(shards["  weights"]) == pytest.approx(float(whole["  weights"]) / 64, abs=0.01)
    assert all(shards[name] == whole[name] for name in ("  frozen CLIP", "  activations"))
    states = (step.weights + step.optimizer + 2 * step.gradients) / 2**30
    one, eight, all_ = numbers(whole["  fsdp, GiB per device"])
    assert numbers(whole["  ddp, GiB per device"]) == [one] * 3
    assert one - eight == pytest.approx(states * 7 / 8, abs=0.1)
    assert one - all_ == pytest.approx(states * 63 / 64, abs=0.1)
    assert float(shards["GiB per device, 64 samples"]) == pytest.approx(all_, abs=0.1)


COST = cost.StepCost(
    *(100, 300, 50),  # FLOPs: forward, both passes, CLIP
    **{"weights": 80, "gradients": 40, "optimizer": 0, "clip": 0, "activations": 0},
)


@pytest.mark.parametrize("sharded", [False, True])
def test_without_communication_only_flops_count(sharded):
    for devices, speed in ((1, 0.1), (8, 1e9)):
        run = {"bf16": False, "flops": 10.0, "node": speed, "network": speed}
        seconds = cost.step_seconds(COST, devices, batches=3, sharded=sharded, **run)
        assert seconds == pytest.approx(3 * (15 + 20))


def test_communication_that_outlasts_computation_counts():
    """A ring of eight sends 7/8 of the bytes; between nodes it is slower."""
    slow = {"flops": 10.0, "node": 1.0, "network": 0.5}
    ddp = partial(cost.step_seconds, COST, sharded=False, bf16=True, **slow)
    reduced = 2 * 40 * 7 / 8  # once per step, during a backward pass of 20 s
    assert ddp(8, batches=1) == pytest.approx(15 + reduced)
    assert ddp(8, batches=2) == pytest.approx(35 + 15 + reduced)
    assert ddp(16, batches=1) == pytest.approx(15 + 2 * 40 * (15 / 16) / 0.5)
    fsdp = partial(cost.step_seconds, COST, sharded=True, **slow)
    gathered, scattered = 80 * 7 / 8, 40 * 7 / 8
    assert fsdp(8, bf16=False, batches=2) == pytest.approx(2 * (2 * gathered + scattered))
    assert fsdp(8, bf16=True, batches=2) == pytest.approx(2 * (gathered + scattered))


def test_the_measured_rate_is_the_last_one_of_the_latest_run(tmp_path):
    assert plan.measured_flops(tmp_path) == {}
    column = "step,train/tflops"
    logs = [f"{column}\n1,200\n", f"{column}\n1,250\n2,310\n3,\n", "step,train/loss\n1,2\n"]
    for time, log in enumerate(logs):
        path = tmp_path / f"run{time}" / "logs" / "metrics.csv"
        path.parent.mkdir(parents=True)
        path.write_text(log)
        os.utime(path, (time, time))
    assert plan.measured_flops(tmp_path) == {"measured in run1": 310e12}


@pytest.mark.parametrize("name", ["decoder", "prior", "clip"])
def test_training_counts_the_flops_that_the_planner_counts(name):
    with FakeTensorMode():
        stage = bundle.build(recipe(name))
    batch = planning.example_batch(CONFIG, stage)
    assert cost.forward_flops(recipe(name), batch) == measured(name).forward_flops


def test_a_peak_is_the_rate_of_a_matrix_product(monkeypatch):
    times = iter([0.0, 4.0, 10.0, 12.0, 20.0, 21.0, 30.0, 33.0, 40.0, 42.0])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(times))
    assert cost.peak_flops(torch.device("cpu"), torch.float32) == 2 * 1024**3


@pytest.mark.parametrize(
    ("setting", "memory", "chosen"), [("auto", 1.0, False), ("auto", 1e-3, True), (False, 0, False)]
)
def test_checkpointing_is_chosen_by_the_memory_of_a_device(setting, memory, chosen):
    override = f"acceleration.gradient_checkpointing={setting}"
    config, step = planned("upsampler_256", "scale=quick", f"memory={memory}", override)
    assert config["acceleration"]["gradient_checkpointing"] is chosen
    rows = plan.describe(config, step)
    assert rows["gradient checkpointing"] == ("on" if chosen else "off")
    assert (step.training_flops > 3.1 * step.forward_flops) is chosen  # 3.3 if recomputed


def test_auto_compares_a_step_with_the_gpu_that_trains(monkeypatch):
    config, _ = planned("upsampler_256", "scale=quick")
    for gpu, gib, chosen in ((False, 0, False), (True, 80, False), (True, 1e-3, True)):
        properties = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, p=properties: p)
        config["acceleration"]["gradient_checkpointing"] = "auto"
        training.choose_checkpointing(config, None)
        assert config["acceleration"]["gradient_checkpointing"] is chosen
