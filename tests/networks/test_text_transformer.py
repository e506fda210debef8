import torch

from unclip.networks import TextTransformer


def test_it_equals_torchs_own_encoder_with_the_same_weights():
    net = TextTransformer(vocabulary_size=20, context_length=6, width=16, layers=2, heads=2)
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
    tokens, mask = torch.randint(1, 20, (2, 5)), torch.arange(5)[None] < torch.tensor([[3], [5]])
    expected = theirs(net.tokens(tokens) + net.positions[:, :5], src_key_padding_mask=~mask)
    torch.testing.assert_close(net(tokens, mask)[mask], expected[mask], atol=1e-5, rtol=1e-5)
