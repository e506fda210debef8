import torch

from unclip.networks import TextTransformer


def text_transformer(layers: int = 2) -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(vocabulary_size=20, context_length=6, width=16, layers=layers, heads=2)


def test_padding_is_not_seen_and_every_token_sees_every_other():
    net = text_transformer()
    tokens, mask = torch.randint(1, 20, (2, 6)), torch.arange(6)[None].expand(2, -1) < 4
    states = net(tokens, mask)
    padded = torch.where(mask, tokens, 0)
    torch.testing.assert_close(net(padded, mask)[:, :4], states[:, :4])
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 20
    assert (net(changed, mask)[:, 0] != states[:, 0]).any(dim=1).all()


def test_order_matters_and_shorter_batches_fit():
    net, seen = text_transformer(), torch.ones(1, 3, dtype=torch.bool)
    one, other = (net(torch.tensor([ids]), seen).sum(1) for ids in ([1, 2, 3], [3, 2, 1]))
    assert not torch.allclose(one, other)


def test_equals_torch_s_own_encoder_with_the_same_weights():
    """torch's pre-norm encoder layers with GELU are an independent implementation."""
    net = text_transformer()
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
    x = net.tokens(tokens) + net.positions
    expected = theirs(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(net(tokens, mask)[mask], expected[mask], atol=1e-5, rtol=1e-5)
