import pytest
import torch
from torch import nn

from unclip.training import optim


def test_no_decay_for_what_scales_shifts_or_stands_for_a_symbol():
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
    assert {id(p) for p in decayed["params"]} == {id(net.linear.weight)}
    assert plain["weight_decay"] == 0.0
    trainable = [p for p in net.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(plain["params"]) == len(trainable)
    optimizer = optim.adamw([decayed, plain], lr=1e-3, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_shared_weights_are_optimised_once():
    net = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    net[1].weight = net[0].weight
    assert sum(len(group["params"]) for group in optim.parameter_groups(net)) == 3


@pytest.mark.parametrize("schedule", [optim.cosine, optim.linear])
def test_warm_up_rises_then_decay_falls_to_the_end(schedule):
    factors = [schedule(step, 100, warm_up_steps=10, final=0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)  # the first step already moves
    assert factors[:10] == sorted(factors[:10])
    assert factors[10] == pytest.approx(1.0)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.55)  # both are half-way in the middle
    assert factors[100] == pytest.approx(0.1)
    assert schedule(1000, 100, final=0.1) == pytest.approx(0.1)


def test_constant_stays():
    assert [optim.constant(step, 9, warm_up_steps=4) for step in (0, 3, 8)] == [0.25, 1.0, 1.0]


def test_a_decay_is_one_minus_the_root_of_its_progress_and_ends_with_the_run():
    def factor(step, **settings):
        return optim.warmup_stable_decay(step, 100, warm_up_steps=4, **settings)

    assert [factor(step) for step in (0, 3, 50, 99, 100)] == [0.25, 1, 1, 1, 1]
    decaying = [factor(step, decay_steps=16) for step in range(101)]
    assert decaying[:85] == [0.25, 0.5, 0.75] + 82 * [1.0]
    for step, expected in ((88, 1 / 2), (93, 1 / 4), (100, 0)):
        assert decaying[step] == pytest.approx(expected)
    assert decaying[99] == pytest.approx(1 - (15 / 16) ** 0.5)
    assert factor(1000, decay_steps=16) == 0


def test_gradient_norm_is_that_of_all_gradients_together():
    net = nn.Linear(3, 2)
    net(torch.randn(5, 3)).square().sum().backward()
    flat = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(optim.gradient_norm(net.parameters()), flat.norm())
