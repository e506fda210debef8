"""Muon compared with its definition and torch's optimizers, and resumed runs."""

import functools

import pytest
import torch
from torch import nn

from unclip.bundle import build
from unclip.networks.unet import ResBlock
from unclip.training import muon, optim
from unclip.training.acceleration import has_native_bf16
from unclip.training.muon import COEFFICIENTS, STEPS, Muon, orthogonalize

SETTINGS = {
    "lr": 3e-3,
    "muon_lr": 0.01,
    "momentum": 0.9,
    "betas": (0.9, 0.99),
    "weight_decay": 0.05,
    "muon_weight_decay": 0.02,
}


@pytest.fixture
def emulated(monkeypatch):
    """A device without native bfloat16."""
    monkeypatch.setattr(muon, "has_native_bf16", lambda device: False)


def matrix(*, singular, rows=24, columns=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(singular, dtype=torch.float64)
    u, v = (
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64))[0]
        for n in (rows, columns)
    )
    return u, values, v


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24), (24, 24)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.05)]
)
def test_newton_schulz_applies_its_polynomial_to_the_singular_values(
    rows, columns, dtype, tolerance, monkeypatch
):
    monkeypatch.setattr(muon, "has_native_bf16", lambda device: dtype == torch.bfloat16)
    u, s, v = matrix(singular=torch.linspace(0.1, 3, 24), rows=rows, columns=columns)
    x = s / s.norm()
    for _ in range(STEPS):
        x = sum(factor * x**power for factor, power in zip(COEFFICIENTS, (1, 3, 5), strict=True))
    found = orthogonalize(((u * s) @ v.T)[None].to(dtype)).squeeze(0).double()
    expected = (u * x) @ v.T
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("native", [True, False])
def test_an_orthogonalized_matrix_is_close_to_its_polar_factor(native, monkeypatch):
    monkeypatch.setattr(muon, "has_native_bf16", lambda device: native)
    u, s, v = matrix(singular=torch.logspace(-1, 0, 24))
    both = torch.stack([(u * s) @ v.T, 1e-4 * (u * s) @ v.T]).float()
    for found in orthogonalize(both):
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.66 and values.max() < 1.22
        polar = u @ v.T
        assert (found.double() * polar).sum() > 0.95 * found.norm() * polar.norm()
    assert not orthogonalize(torch.zeros(1, 3, 5)).any()


def steps_of(optimizer, parameters, steps=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def copies(*shapes):
    """Returns the same parameters twice."""
    starts = [torch.linspace(-1, 1, a * b).view(a, b) for a, b in shapes]
    return [[nn.Parameter(start.clone()) for start in starts] for _ in range(2)]


@pytest.mark.parametrize("native", [True, False])
def test_on_matrices_it_equals_torchs_muon(native, monkeypatch):
    """Except for the rounding of bfloat16, in which torch always computes."""
    monkeypatch.setattr(muon, "has_native_bf16", lambda device: native)
    ours, theirs = copies((8, 12), (12, 8), (8, 12), (20, 5))
    start = [parameter.detach().clone() for parameter in ours]
    other = nn.Parameter(torch.zeros(3))
    groups = [{"params": [other]}, {"params": ours, "hidden": True}]
    steps_of(Muon(groups, **SETTINGS), [*ours])
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.02}
    steps_of(torch.optim.Muon(theirs, **settings), theirs)
    for before, one, its in zip(start, ours, theirs, strict=True):
        moved = (its - before).norm()
        assert moved > 0.03
        assert (one - its).norm() < 0.02 * moved


def test_a_convolution_is_treated_as_the_matrix_of_its_filters(emulated):
    conv = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    flat = nn.Parameter(conv.detach().flatten(1).clone())
    other = [{"params": [nn.Parameter(torch.zeros(3))]}]
    optimizers = [Muon([*other, {"params": [p], "hidden": True}], **SETTINGS) for p in (conv, flat)]
    for _ in range(3):
        flat.grad = torch.randn_like(flat)
        conv.grad = flat.grad.view(conv.shape).to(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(conv.flatten(1), flat)
    assert optimizers[0].state[conv]["momentum"].stride() == conv.stride()


def test_other_parameters_equal_torchs_adamw_bit_for_bit(emulated):
    ours, theirs = copies((8, 12), (12, 8))
    hidden = nn.Parameter(torch.ones(4, 4))
    groups = [
        {"params": ours[:1]},
        {"params": ours[1:], "weight_decay": 0.0},
        {"params": [hidden], "hidden": True},
    ]
    steps_of(Muon(groups, **SETTINGS), ours)
    groups = [{"params": theirs[:1]}, {"params": theirs[1:], "weight_decay": 0.0}]
    settings = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.05}
    steps_of(torch.optim.AdamW(groups, **settings, fused=True), theirs)
    for one, its in zip(ours, theirs, strict=True):
        assert torch.equal(one, its)
    assert torch.equal(hidden, torch.ones(4, 4))  # it has no gradient


def names_of(stage):
    names = {parameter: name for name, parameter in stage.named_parameters()}
    return [{names[p] for p in group["params"]} for group in optim.parameter_groups(stage)]


def test_muon_gets_the_matrices_in_the_blocks_of_a_unet():
    widths = {"channels": 8, "multipliers": [1, 2], "blocks": 1, "head_width": 8, "groups": 4}
    conditioning = {"image_embedding": 6, "text_states": 6, "context_width": 8}
    network = build(
        {"_target_": "unclip.networks.UNet", "attention_levels": [1], "conditioning": conditioning}
        | widths
    )
    outer, plain, hidden = names_of(network)
    assert "conv_in.weight" in outer and "conv_out.weight" in outer
    assert "conditioning.image_to_context.weight" in outer and "time.0.weight" in outer
    assert {"down.0.blocks.0.conv_in.weight", "middle_attention.qkv.weight"} <= hidden
    assert {"up.0.blocks.0.skip.weight", "down.1.attention.0.context_kv.weight"} <= hidden
    inside = ("down.", "middle", "up.")
    assert all(name.startswith(inside) and name.endswith(".weight") for name in hidden)
    assert not any(name.startswith(inside) for name in outer)
    assert sum(map(len, (outer, plain, hidden))) == len(list(network.parameters()))


def test_muon_gets_the_matrices_in_the_blocks_of_a_transformer():
    sizes = {"embedding_dim": 6, "text_width": 6, "context_length": 5}
    sizes |= {"width": 8, "layers": 2, "heads": 2}
    matrices = {"qkv.weight", "out.weight", "mlp.0.weight", "mlp.2.weight"}
    expected = {f"blocks.{layer}.{name}" for layer in (0, 1) for name in matrices}
    for target, more in (("PriorTransformer", {}), ("ARTransformer", {"components": 3})):
        more = more and more | {"buckets": 9}
        network = build({"_target_": f"unclip.networks.{target}"} | sizes | more)
        outer, plain, hidden = names_of(network)
        assert hidden == expected
        assert {"text_in.weight", "text_embedding_in.weight", "out.weight"} <= outer
        assert "positions" in plain


@pytest.mark.parametrize("layers", [2, [1, 1, 1, 1]])
def test_muon_gets_the_matrices_in_the_blocks_of_clips_towers(layers):
    sizes = {"embed_dim": 8, "image_size": 32, "patch_size": 16, "vision_width": 16}
    sizes |= {"vision_layers": layers, "vision_head_width": 8, "text_width": 8}
    sizes |= {"text_layers": 1, "text_heads": 2, "vocabulary_size": 600}
    stage = build({"_target_": "unclip.stages.ClipStage"} | sizes)
    outer, plain, hidden = names_of(stage)
    attention = "model.transformer.resblocks.0.attn.in_proj_weight"
    convolution = "model.visual.layer1.0.conv1.weight"
    assert attention in hidden and (convolution in hidden) == isinstance(layers, list)
    assert "model.token_embedding.weight" in plain and "model.positional_embedding" in plain
    assert "model.text_projection" in outer and "model.visual.conv1.weight" in outer
    assert "model.logit_scale" in plain


def test_a_run_resumes_bit_exactly_and_a_schedule_scales_both_rates(kit, tmp_path):
    class Blocks(kit.TinyStage):
        def __init__(self):
            super().__init__()
            block = ResBlock(8, 8, 4, groups=2, dropout=0.1, scale_shift=True)
            self.network.insert(1, WithoutTime(block))

    def run(folder, steps, resume=None):
        module = kit.module(
            stage=Blocks,
            optimizer=functools.partial(Muon, **SETTINGS),
            schedule=lambda step, max_steps: 1 / (1 + step),
        )
        trainer = kit.trainer(steps, *kit.callbacks(folder, every_steps=100), folder=folder)
        trainer.fit(module, kit.ImageData(), ckpt_path=resume)
        return torch.load(folder / "last.ckpt", weights_only=True), trainer.optimizers[0]

    whole, optimizer = run(tmp_path / "whole", 20)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([3e-3 / 21, 3e-3 / 21, 0.01 / 21])
    run(tmp_path / "cut", 16)  # an epoch
    cut, _ = run(tmp_path / "cut", 20, tmp_path / "cut" / "last.ckpt")
    momenta = [s for s in whole["optimizer_states"][0]["state"].values() if "momentum" in s]
    assert len(momenta) == 3
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, cut["state_dict"][name]), name
    states = zip(*(c["optimizer_states"][0]["state"].values() for c in (whole, cut)), strict=True)
    for one, other in states:
        assert all(torch.equal(one[name], other[name]) for name in one)


class WithoutTime(nn.Module):
    """A residual block with a constant embedding."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x, x.new_ones(1, 4))


def test_other_devices_have_no_native_bf16():
    assert not has_native_bf16("meta")
