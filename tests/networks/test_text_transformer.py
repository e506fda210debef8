import pytest
import torch

from unclip.networks import TextTransformer


@pytest.fixture
def net():
    return TextTransformer(vocabulary_size=20, context_length=6, width=16, layers=2, heads=2)


def test_padding_is_not_seen(net):
    tokens, mask = torch.randint(1, 20, (2, 6)), torch.arange(6)[None].expand(2, -1) < 4
    padded = net(torch.where(mask, tokens, 0), mask)
    torch.testing.assert_close(padded[:, :4], net(tokens, mask)[:, :4])


def test_a_token_sees_later_tokens(net):
    tokens, mask = torch.randint(1, 19, (2, 6)), torch.ones(2, 6, dtype=torch.bool)
    states = net(tokens, mask)
    tokens[:, 3] += 1
    assert (net(tokens, mask)[:, 0] != states[:, 0]).any(dim=1).all()


def test_the_order_of_tokens_matters_and_batches_may_be_shorter_than_the_context(net):
    mask = torch.ones(1, 3, dtype=torch.bool)
    one, other = (net(torch.tensor([ids]), mask).sum(1) for ids in ([1, 2, 3], [3, 2, 1]))
    assert not torch.allclose(one, other)


def test_it_equals_torchs_own_encoder_with_the_same_weights(net):
    layer = torch.nn.TransformerEncoderLayer(
        16, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    theirs = torch.nn.TransformerEncoder(layer, 2, norm=net.norm, enable_nested_tensor=False).eval()
    for block, peer in zip(net.blocks, theirs.layers, strict=True):
        peer.norm1, peer.norm2 = block.norm_attention, block.norm_mlp
        peer.linear1, peer.linear2 = block.mlp[0], block.mlp[2]
        peer.self_attn.out_proj = block.out
        peer.self_attn.in_proj_weight = block.qkv.weight
        peer.self_attn.in_proj_bias = block.qkv.bias
    tokens, mask = torch.randint(1, 20, (2, 6)), torch.arange(6)[None] < torch.tensor([[4], [6]])
    expected = theirs(net.tokens(tokens) + net.positions, src_key_padding_mask=~mask)
    torch.testing.assert_close(net(tokens, mask)[mask], expected[mask], atol=1e-5, rtol=1e-5)
