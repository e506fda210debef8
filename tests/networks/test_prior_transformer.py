import pytest
import torch

from unclip.networks import PriorTransformer

SIZES = dict(embedding_dim=8, text_width=12, context_length=5, width=16, layers=3, heads=2)


def caption(batch: int = 2) -> dict[str, torch.Tensor]:
    return {
        "text_states": torch.randn(batch, 5, 12),
        "text_mask": torch.arange(5)[None] < torch.tensor([[3], [5]]),
        "text_embedding": torch.randn(batch, 8),
    }


def test_several_noises_in_one_pass_equal_separate_passes():
    net, given = PriorTransformer(**SIZES), caption()
    x_t, t = torch.randn(2, 4, 8), torch.randint(0, 1000, (2, 4))
    packed = net.suffix(net.prefix(**given), x_t, t)
    for k in range(4):
        torch.testing.assert_close(packed[:, k], net(x_t[:, k], t[:, k], **given))


def test_equals_plain_causal_attention_over_the_whole_sequence():
    """The two halves against one pass of the same weights over all tokens."""
    net, given = PriorTransformer(**SIZES), caption()
    x_t, t = torch.randn(2, 8), torch.tensor([10, 900])
    x = torch.cat(
        [
            net.text_in(given["text_states"]),
            net.text_embedding_in(given["text_embedding"])[:, None],
            net.time(t)[:, None],
            net.image_in(x_t)[:, None],
            net.query.expand(2, -1, -1),
        ],
        dim=1,
    )
    x = x + net.positions
    seen = torch.cat([given["text_mask"], torch.ones(2, 4, dtype=torch.bool)], dim=1)
    allowed = torch.ones(9, 9).tril().bool() & seen[:, None]
    for block in net.blocks:
        q, k, v = block.qkv(block.norm_attention(x)).chunk(3, dim=2)
        q, k, v = (part.reshape(2, 9, 2, 8).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(2, 3) / 8**0.5
        weights = scores.masked_fill(~allowed[:, None], float("-inf")).softmax(dim=-1)
        x = x + block.out((weights @ v).transpose(1, 2).reshape(2, 9, 16))
        x = x + block.mlp(block.norm_mlp(x))
    expected = net.out(net.norm_out(x[:, -1]))
    torch.testing.assert_close(net(x_t, t, **given), expected, atol=1e-5, rtol=1e-5)


def test_padding_is_not_seen():
    net, given = PriorTransformer(**SIZES), caption()
    x_t, t = torch.randn(2, 8), torch.tensor([10, 900])
    out = net(x_t, t, **given)
    given["text_states"] = given["text_states"] + 5 * ~given["text_mask"][..., None]
    torch.testing.assert_close(net(x_t, t, **given), out)


def test_every_parameter_gets_a_gradient():
    net = PriorTransformer(**SIZES)
    net(torch.randn(2, 8), torch.tensor([10, 900]), **caption()).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_karlo_s_size():
    with torch.device("meta"):
        net = PriorTransformer(
            embedding_dim=768, text_width=768, context_length=77, width=2048, layers=20, heads=32
        )
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(1_022_028_544, rel=1e-6)
