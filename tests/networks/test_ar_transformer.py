import itertools

import pytest
import torch

from unclip.networks.ar_transformer import ARTransformer

TEXT = dict(embedding_dim=8, text_width=12, context_length=5)
SIZES = dict(**TEXT, components=6, buckets=7, width=16, layers=3, heads=2)


def caption(batch: int = 2) -> dict[str, torch.Tensor]:
    return {
        "text_states": torch.randn(batch, 5, 12),
        "text_mask": torch.arange(5)[None] < torch.tensor([[3], [5]]),
        "text_embedding": torch.randn(batch, 8),
    }


def shaken(net: ARTransformer) -> ARTransformer:
    """Weights so large that every token matters."""
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


@torch.no_grad()
def test_cached_decoding_equals_one_pass_over_all_tokens():
    net, given = shaken(ARTransformer(**SIZES)), caption()
    dot_product, codes = torch.tensor([2, 5]), torch.randint(0, 7, (2, 6))
    prefix = net.prefix(**given)
    whole = net(prefix, dot_product, codes)
    next_logits = net.decoder(prefix)
    inputs = [dot_product, *codes[:, :-1].unbind(1)]
    cached = torch.stack([next_logits(code) for code in inputs], dim=1)
    torch.testing.assert_close(cached, whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_copies_of_a_caption_go_their_own_ways():
    net, given = shaken(ARTransformer(**SIZES)), caption()
    dot_product, codes = torch.randint(0, 7, (2, 3)), torch.randint(0, 7, (2, 3, 6))
    prefix = net.prefix(**given)
    next_logits = net.decoder(prefix, copies=3)
    inputs = [dot_product, *codes[..., :-1].unbind(2)]
    cached = torch.stack([next_logits(code.flatten()) for code in inputs], dim=1)
    cached = cached.unflatten(0, (2, 3))
    for k in range(3):
        alone = net(prefix, dot_product[:, k], codes[:, k])
        torch.testing.assert_close(cached[:, k], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_equals_plain_causal_attention_over_the_whole_sequence():
    net, given = shaken(ARTransformer(**SIZES)), caption()
    dot_product, codes = torch.tensor([2, 5]), torch.randint(0, 7, (2, 6))
    x = torch.cat(
        [
            net.text_in(given["text_states"]),
            net.text_embedding_in(given["text_embedding"])[:, None],
            net.dot_product_in(dot_product)[:, None],
            net.component_in(codes)[:, :-1],
        ],
        dim=1,
    )
    length = x.shape[1]
    assert length == 5 + 1 + 6
    x = x + net.positions
    seen = torch.cat([given["text_mask"], torch.ones(2, 7, dtype=torch.bool)], dim=1)
    allowed = torch.ones(length, length).tril().bool() & seen[:, None]
    for block in net.blocks:
        q, k, v = block.qkv(block.norm_attention(x)).chunk(3, dim=2)
        q, k, v = (part.reshape(2, length, 2, 8).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(2, 3) / 8**0.5
        weights = scores.masked_fill(~allowed[:, None], float("-inf")).softmax(dim=-1)
        x = x + block.out((weights @ v).transpose(1, 2).reshape(2, length, 16))
        x = x + block.mlp(block.norm_mlp(x))
    expected = net.out(net.norm_out(x[:, 6:]))
    torch.testing.assert_close(
        net(net.prefix(**given), dot_product, codes), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("components", [2, 3])
@torch.no_grad()
def test_the_likelihood_sums_to_one(components):
    """Over every sequence of codes that there is."""
    net = shaken(ARTransformer(**{**SIZES, "components": components, "buckets": 4}))
    given = {name: value[:1] for name, value in caption().items()}
    codes = torch.tensor(list(itertools.product(range(4), repeat=components)))
    given = {name: value.expand(len(codes), *value.shape[1:]) for name, value in given.items()}
    dot_product = torch.full((len(codes),), 3)
    logits = net(net.prefix(**given), dot_product, codes).double()
    likelihood = logits.log_softmax(dim=2).gather(2, codes[..., None]).sum((1, 2)).exp()
    assert likelihood.std() > 1e-3  # a uniform one would sum to one whatever it looks at
    torch.testing.assert_close(likelihood.sum().item(), 1.0, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_code_tells_of_none_before_it_and_padding_of_nothing():
    net, given = shaken(ARTransformer(**SIZES)), caption()
    dot_product, codes = torch.tensor([2, 5]), torch.randint(0, 6, (2, 6))
    logits = net(net.prefix(**given), dot_product, codes)
    changed = codes.clone()
    changed[:, 3] += 1
    other = net(net.prefix(**given), dot_product, changed)
    torch.testing.assert_close(other[:, :4], logits[:, :4])
    assert ((other - logits).abs().amax(2)[:, 4:] > 1e-4).all()
    given["text_states"] = given["text_states"] + 5 * ~given["text_mask"][..., None]
    torch.testing.assert_close(net(net.prefix(**given), dot_product, codes), logits)


def test_every_parameter_gets_a_gradient():
    net = ARTransformer(**SIZES)
    codes = torch.randint(0, 7, (2, 6))
    net(net.prefix(**caption()), torch.tensor([2, 5]), codes).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_codes_begin_alike_if_they_are_near_each_other():
    weight = ARTransformer(**{**SIZES, "buckets": 64, "width": 512}).component_in.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    alike = torch.nn.functional.cosine_similarity(weight[30], weight, dim=1)
    assert alike[31] > 0.95
    assert alike[40:50].abs().max() < alike[34] < alike[31]
