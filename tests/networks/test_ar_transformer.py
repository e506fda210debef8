import pytest
import torch
from plain_attention import TEXT, run_plainly, two_captions
from random_weights import randomize

from unclip.networks.ar_transformer import ARTransformer


def network(components: int = 6, buckets: int = 7, width: int = 16) -> ARTransformer:
    sizes = {"components": components, "buckets": buckets, "width": width}
    return ARTransformer(**TEXT, **sizes, layers=3, heads=2)


@pytest.fixture
def net():
    return randomize(network(), std=0.3)  # so large that every token matters


@pytest.mark.parametrize("copies", [1, 3])
@torch.no_grad()
def test_cached_decoding_equals_one_pass_over_all_tokens(net, copies):
    caption = two_captions()
    dot_product, codes = torch.randint(0, 7, (2, copies)), torch.randint(0, 7, (2, copies, 6))
    prefix = net.prefix(**caption)
    next_logits = net.decoder(prefix, copies=copies)
    inputs = [dot_product, *codes[..., :-1].unbind(2)]
    cached = torch.stack([next_logits(code.flatten()) for code in inputs], dim=1)
    cached = cached.unflatten(0, (2, copies))
    for k in range(copies):
        whole = net(dot_product[:, k], codes[:, k], **caption)
        torch.testing.assert_close(cached[:, k], whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_it_equals_causal_attention_over_the_whole_sequence(net):
    caption, dot_product, codes = two_captions(), torch.tensor([2, 5]), torch.randint(0, 7, (2, 6))
    others = [net.dot_product_in(dot_product)[:, None], net.component_in(codes)[:, :-1]]
    expected = run_plainly(net, caption, others)[:, 6:]
    logits = net(dot_product, codes, **caption)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_embeddings_of_neighboring_codes_are_similar_at_first():
    weight = network(buckets=64, width=512).component_in.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    cosine = torch.nn.functional.cosine_similarity(weight[30], weight, dim=1)
    assert cosine[31] > 0.95
    assert cosine[40:50].abs().max() < cosine[34] < cosine[31]
