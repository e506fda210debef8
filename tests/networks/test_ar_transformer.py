import itertools

import pytest
import torch
from plain_attention import TEXT, run_plainly, two_captions, with_other_padding
from random_weights import randomize, without_gradient

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


@pytest.mark.parametrize("components", [2, 3])
@torch.no_grad()
def test_the_likelihoods_of_all_sequences_sum_to_one(components):
    net = randomize(network(components, buckets=4), std=0.3)
    codes = torch.tensor(list(itertools.product(range(4), repeat=components)))
    caption = {
        name: value[:1].expand(len(codes), *value.shape[1:])
        for name, value in two_captions().items()
    }
    logits = net(torch.full((len(codes),), 3), codes, **caption).double()
    likelihood = logits.log_softmax(dim=2).gather(2, codes[..., None]).sum((1, 2)).exp()
    assert likelihood.std() > 1e-3  # a uniform one would always sum to one
    torch.testing.assert_close(likelihood.sum().item(), 1.0, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_code_changes_the_logits_of_later_components_only(net):
    caption, dot_product, codes = two_captions(), torch.tensor([2, 5]), torch.randint(0, 6, (2, 6))
    logits = net(dot_product, codes, **caption)
    codes[:, 3] += 1
    changed = net(dot_product, codes, **caption)
    torch.testing.assert_close(changed[:, :4], logits[:, :4])
    assert ((changed - logits).abs().amax(2)[:, 4:] > 1e-4).all()


@torch.no_grad()
def test_padding_is_not_seen(net):
    caption, dot_product, codes = two_captions(), torch.tensor([2, 5]), torch.randint(0, 7, (2, 6))
    padded = net(dot_product, codes, **with_other_padding(caption))
    torch.testing.assert_close(padded, net(dot_product, codes, **caption))


def test_every_parameter_gets_a_gradient():
    net, codes = network(), torch.randint(0, 7, (2, 6))
    net(torch.tensor([2, 5]), codes, **two_captions()).square().sum().backward()
    assert without_gradient(net) == []


def test_embeddings_of_neighboring_codes_are_similar_at_first():
    weight = network(buckets=64, width=512).component_in.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    cosine = torch.nn.functional.cosine_similarity(weight[30], weight, dim=1)
    assert cosine[31] > 0.95
    assert cosine[40:50].abs().max() < cosine[34] < cosine[31]
