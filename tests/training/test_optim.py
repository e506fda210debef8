"""Parameter groups, schedules, and Muon compared with its definition and torch's optimizers."""

from functools import partial

import pytest
import torch
from torch import nn

from unclip.bundle import build
from unclip.networks.unet import ResBlock
from unclip.training import optim
from unclip.training.optim import COEFFICIENTS, STEPS, Muon, orthogonalize

SETTINGS = {
    **{"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.05},
    **{"muon_lr": 0.01, "momentum": 0.9, "muon_weight_decay": 0.02},
}


@pytest.fixture
def native(monkeypatch, request):
    """Whether the device has native bfloat16; by default it has not."""
    native = getattr(request, "param", False)
    monkeypatch.setattr(optim, "has_native_bf16", lambda device: native)
    return native


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24), (24, 24)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.05)]
)
def test_newton_schulz_applies_its_polynomial_to_the_singular_values(
    rows, columns, dtype, tolerance, monkeypatch
):
    """After five steps, those above a hundredth of the norm are near 1."""
    monkeypatch.setattr(optim, "has_native_bf16", lambda device: dtype == torch.bfloat16)
    random = partial(torch.randn, dtype=torch.float64)
    u, v = (torch.linalg.qr(random(n, 24))[0] for n in (rows, columns))
    s = torch.linspace(0.1, 3, 24, dtype=torch.float64)
    x = s / s.norm()
    for _ in range(STEPS):
        x = sum(factor * x**power for factor, power in zip(COEFFICIENTS, (1, 3, 5), strict=True))
    found = orthogonalize(((u * s) @ v.T)[None].to(dtype)).squeeze(0).double()
    expected = (u * x) @ v.T
    assert 0.68 < x.min() < x.max() < 1.21
    assert (found - expected).norm() <= tolerance * expected.norm()
    assert not orthogonalize(torch.zeros(1, rows, columns)).any()


def steps_of(optimizer, parameters):
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def copies(*shapes):
    """Returns the same parameters twice."""
    starts = [torch.linspace(-1, 1, a * b).view(a, b) for a, b in shapes]
    return [[nn.Parameter(start.clone()) for start in starts] for _ in range(2)]


@pytest.mark.parametrize("native", [True, False], indirect=True)
def test_on_matrices_it_equals_torchs_muon(native):
    """Except for the rounding of bfloat16, in which torch always computes."""
    ours, theirs = copies((8, 12), (12, 8), (8, 12), (20, 5))
    start = [parameter.detach().clone() for parameter in ours]
    groups = [{"params": [nn.Parameter(torch.zeros(3))]}, {"params": ours, "hidden": True}]
    steps_of(Muon(groups, **SETTINGS), ours)
    steps_of(torch.optim.Muon(theirs, lr=0.01, momentum=0.9, weight_decay=0.02), theirs)
    for before, one, its in zip(start, ours, theirs, strict=True):
        moved = (its - before).norm()
        assert moved > 0.03
        assert (one - its).norm() < 0.02 * moved


def test_a_convolution_is_treated_as_the_matrix_of_its_filters(native):
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


def test_other_parameters_equal_torchs_adamw_bit_for_bit(native):
    def groups(parameters):
        return [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]

    ours, theirs = copies((8, 12), (12, 8))
    hidden = nn.Parameter(torch.ones(4, 4))
    muon = Muon([*groups(ours), {"params": [hidden], "hidden": True}], **SETTINGS)
    settings = {name: SETTINGS[name] for name in ("lr", "betas", "weight_decay")}
    adamw = torch.optim.AdamW(groups(theirs), **settings, fused=True)
    for optimizer, parameters in ((muon, ours), (adamw, theirs)):
        steps_of(optimizer, parameters)
    for one, its in zip(ours, theirs, strict=True):
        assert torch.equal(one, its)
    assert torch.equal(hidden, torch.ones(4, 4))  # it has no gradient


def names_of(target, **recipe):
    """Return the names of the parameters of each group of a network or stage."""
    module = build({"_target_": f"unclip.{target}", **recipe})
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = [{names[p] for p in group["params"]} for group in optim.parameter_groups(module)]
    assert sum(map(len, groups)) == len(names)
    return groups


def test_muon_gets_the_matrices_in_the_blocks_of_a_unet():
    sizes = {"channels": 8, "multipliers": [1, 2], "blocks": 1, "head_width": 8, "groups": 4}
    conditioning = {"image_embedding": 6, "text_states": 6, "context_width": 8}
    more = {"attention_levels": [1], "conditioning": conditioning}
    outer, _, hidden = names_of("networks.UNet", **sizes, **more)
    assert "conv_in.weight" in outer and "conv_out.weight" in outer
    assert "conditioning.image_to_context.weight" in outer and "time.0.weight" in outer
    assert {"down.0.blocks.0.conv_in.weight", "middle_attention.qkv.weight"} <= hidden
    assert {"up.0.blocks.0.skip.weight", "down.1.attention.0.context_kv.weight"} <= hidden
    inside = ("down.", "middle", "up.")
    assert all(name.startswith(inside) and name.endswith(".weight") for name in hidden)
    assert not any(name.startswith(inside) for name in outer)


@pytest.mark.parametrize(
    ("name", "more"),
    [("PriorTransformer", {}), ("ARTransformer", {"components": 3, "buckets": 9})],
)
def test_muon_gets_the_matrices_in_the_blocks_of_a_transformer(name, more):
    sizes = {"embedding_dim": 6, "text_width": 6, "context_length": 5}
    sizes |= {"width": 8, "layers": 2, "heads": 2}
    matrices = {"qkv.weight", "out.weight", "mlp.0.weight", "mlp.2.weight"}
    outer, plain, hidden = names_of(f"networks.{name}", **sizes, **more)
    assert hidden == {f"blocks.{layer}.{name}" for layer in (0, 1) for name in matrices}
    assert {"text_in.weight", "text_embedding_in.weight", "out.weight"} <= outer
    assert "positions" in plain


@pytest.mark.parametrize("layers", [2, [1, 1, 1, 1]])
def test_muon_gets_the_matrices_in_the_blocks_of_clips_towers(layers):
    sizes = {"embed_dim": 8, "image_size": 32, "patch_size": 16, "vision_width": 16}
    sizes |= {"vision_layers": layers, "vision_head_width": 8, "text_width": 8}
    sizes |= {"text_layers": 1, "text_heads": 2, "vocabulary_size": 600}
    outer, plain, hidden = names_of("stages.ClipStage", **sizes)
    assert "model.transformer.resblocks.0.attn.in_proj_weight" in hidden
    assert ("model.visual.layer1.0.conv1.weight" in hidden) == isinstance(layers, list)
    assert "model.token_embedding.weight" in plain and "model.positional_embedding" in plain
    assert "model.text_projection" in outer and "model.visual.conv1.weight" in outer
    assert "model.logit_scale" in plain


def test_a_run_resumes_bit_exactly_and_a_schedule_scales_both_rates(kit):
    class Blocks(kit.TinyStage):
        def __init__(self):
            super().__init__()
            block = ResBlock(8, 8, 4, groups=2, dropout=0.1, scale_shift=True)
            forward, block.forward = block.forward, lambda x: forward(x, x.new_ones(1, 4))
            self.network.insert(1, block)

    def run(steps, resume=None):
        decay = {"schedule": lambda step, max_steps: 1 / (1 + step)}
        module = kit.module(stage=Blocks, optimizer=partial(Muon, **SETTINGS), **decay)
        _, trainer = kit.fit(steps, module=module, resume=resume)
        return kit.saved(), trainer.optimizers[0]

    whole, optimizer = run(20)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([3e-3 / 21, 3e-3 / 21, 0.01 / 21])
    run(16)  # an epoch
    cut, _ = run(20, kit.folder / "last.ckpt")
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(cut[part], whole[part], rtol=0, atol=0)
    states = whole["optimizer_states"][0]["state"].values()
    assert sum("momentum" in state for state in states) == 3


def test_norms_biases_embeddings_and_positions_are_not_decayed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 5)
            self.norm = nn.LayerNorm(5)
            self.words = nn.Embedding(7, 5)
            self.positional_embedding = nn.Parameter(torch.zeros(3, 5))
            self.positions = nn.Parameter(torch.zeros(1, 3, 5))
            self.states = nn.Parameter(torch.zeros(3, 5))
            self.query = nn.Parameter(torch.zeros(1, 1, 5))
            self.frozen = nn.Parameter(torch.zeros(5, 5), requires_grad=False)

    net = Net()
    decayed, plain = optim.parameter_groups(net)  # it has no blocks
    assert [id(p) for p in decayed["params"]] == [id(net.linear.weight)]
    trainable = [p for p in net.parameters() if p.requires_grad]
    assert len(plain["params"]) == len(trainable) - 1
    optimizer = torch.optim.AdamW([decayed, plain], lr=1e-3, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_shared_weights_are_optimized_once():
    net = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    net[1].weight = net[0].weight
    assert sum(len(group["params"]) for group in optim.parameter_groups(net)) == 3


def test_the_cosine_schedule_warms_up_and_falls_to_its_final_value():
    factors = [optim.cosine(step, 100, warm_up_steps=10, final=0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)  # the first step already moves
    assert factors[:10] == sorted(factors[:10])
    assert factors[10] == pytest.approx(1.0)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.55)  # half-way in the middle
    assert factors[100] == optim.cosine(1000, 100, final=0.1) == pytest.approx(0.1)


def test_a_decay_follows_one_minus_the_root_of_its_progress():
    def factor(step, **settings):
        return optim.warmup_stable_decay(step, 100, warm_up_steps=4, **settings)

    assert [factor(step) for step in (0, 3, 50, 99, 100)] == [0.25, 1, 1, 1, 1]
    decaying = [factor(step, decay_steps=16) for step in range(101)]
    assert decaying[:85] == [0.25, 0.5, 0.75] + 82 * [1.0]
    for step, expected in ((88, 1 / 2), (93, 1 / 4), (99, 1 - (15 / 16) ** 0.5), (100, 0)):
        assert decaying[step] == pytest.approx(expected)
    assert factor(1000, decay_steps=16) == 0
