import pytest
import torch
from torch import nn

from unclip.training import optim


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
    assert {id(p) for p in decayed["params"]} == {id(net.linear.weight)}
    assert plain["weight_decay"] == 0.0
    trainable = [p for p in net.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(plain["params"]) == len(trainable)
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
    assert factors[100] == pytest.approx(0.1)
    assert optim.cosine(1000, 100, final=0.1) == pytest.approx(0.1)


def test_a_decay_follows_one_minus_the_root_of_its_progress():
    def factor(step, **settings):
        return optim.warmup_stable_decay(step, 100, warm_up_steps=4, **settings)

    assert [factor(step) for step in (0, 3, 50, 99, 100)] == [0.25, 1, 1, 1, 1]
    decaying = [factor(step, decay_steps=16) for step in range(101)]
    assert decaying[:85] == [0.25, 0.5, 0.75] + 82 * [1.0]
    for step, expected in ((88, 1 / 2), (93, 1 / 4), (100, 0)):
        assert decaying[step] == pytest.approx(expected)
    assert decaying[99] == pytest.approx(1 - (15 / 16) ** 0.5)
    assert factor(1000, decay_steps=16) == 0


def test_gradient_norm_is_the_norm_of_all_gradients_together():
    net = nn.Linear(3, 2)
    net(torch.randn(5, 3)).square().sum().backward()
    flat = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(optim.gradient_norm(net.parameters()), flat.norm())
