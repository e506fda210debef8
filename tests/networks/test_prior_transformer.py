import pytest
import torch
from plain_attention import TEXT, run_plainly, two_captions

from unclip.networks import PriorTransformer


@pytest.fixture
def net():
    return PriorTransformer(**TEXT, width=16, layers=3, heads=2)


def test_one_pass_equals_separate_passes_and_a_prefix_with_its_suffix_to_the_bit(net):
    caption, x_t, t = two_captions(), torch.randn(2, 4, 8), torch.randint(0, 1000, (2, 4))
    together = net(x_t, t, **caption)
    assert torch.equal(together, net.suffix(net.prefix(**caption), x_t, t))
    for k in range(4):
        separate = net(x_t[:, k, None], t[:, k, None], **caption)
        torch.testing.assert_close(together[:, k, None], separate)


def test_prefix_and_suffix_equal_causal_attention_over_the_whole_sequence(net):
    caption, x_t, t = two_captions(), torch.randn(2, 1, 8), torch.tensor([[10], [900]])
    others = [net.time(t[:, 0])[:, None], net.image_in(x_t), net.query.expand(2, -1, -1)]
    expected = run_plainly(net, caption, others)[:, -1:]
    torch.testing.assert_close(net(x_t, t, **caption), expected, atol=1e-5, rtol=1e-5)
