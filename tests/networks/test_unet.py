import pytest
import torch
from random_weights import randomize, without_gradient

from unclip.networks import UNet

CONDITIONING = {"image_embedding": 8, "text_states": 12, "context_width": 16}
TINY = {"channels": 16, "multipliers": [1, 2], "blocks": 1, "head_width": 8, "groups": 8}
MAPS = {"levels": [1], "hidden": 8, "rank": 3, "image_size": 8}


T = torch.tensor([3, 700])


def unet(**options) -> UNet:
    """Return a small U-Net with random weights everywhere; ADM starts residual branches at 0."""
    return randomize(UNet(**TINY, **options), std=0.1)


def conditioned(**options) -> UNet:
    return unet(conditioning=CONDITIONING, **options)


def condition(batch: int = 2, length: int = 5) -> dict[str, torch.Tensor]:
    return {
        "image_embedding": torch.randn(batch, 8),
        "text_embedding": torch.randn(batch, 8),
        "text_states": torch.randn(batch, length, 12),
        "text_mask": torch.arange(length)[None].expand(batch, -1) < 3,
    }


@pytest.mark.parametrize("patch", [1, 2])
def test_it_starts_at_zero_and_keeps_the_size(patch):
    net = UNet(**TINY, conditioning=CONDITIONING, attention_levels=[1], out_channels=6, patch=patch)
    out = net(torch.randn(2, 3, 16, 24), torch.tensor([0, 999]), **condition())
    assert out.shape == (2, 6, 16, 24)
    assert (out == 0).all()


def test_padding_tokens_are_not_seen_and_real_ones_are():
    net = conditioned(attention_levels=[1])
    x, given = torch.randn(2, 3, 8, 8), condition()
    out = net(x, T, **given)
    padded = {**given, "text_states": given["text_states"].clone()}
    padded["text_states"][:, 3:] += 100
    torch.testing.assert_close(net(x, T, **padded), out)
    padded["text_states"][:, 2] += 1
    assert not torch.allclose(net(x, T, **padded), out)


@pytest.mark.parametrize("name", ["image_embedding", "text_embedding"])
def test_embeddings_matter(name):
    net = conditioned(attention_levels=[1])
    x, given = torch.randn(2, 3, 8, 8), condition()
    changed = net(x, T, **{**given, name: given[name] + 1})
    assert not torch.allclose(changed, net(x, T, **given))


def test_it_is_convolutional_without_attention():
    """Without norms, a crop's output equals the whole image's away from the borders."""
    net = unet(in_channels=6)
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.GroupNorm):
                setattr(parent, name, torch.nn.Identity())
    x, t, far = torch.randn(1, 6, 112, 96), torch.tensor([3]), 34  # receptive field
    with torch.no_grad():
        whole, crop = net(x, t)[..., 16:96, 8:88], net(x[..., 16:96, 8:88], t)
    inside = (..., slice(far, -far), slice(far, -far))
    scale = whole.std().item()
    torch.testing.assert_close(crop[inside], whole[inside], atol=1e-5 * scale, rtol=1e-5)
    assert (crop - whole).abs().max() > 0.1 * scale


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((10, 8), {"patch": 2}, "multiples of 4"),
        ((16, 16), {"feature_maps": MAPS}, "feature maps are for 8×8"),
        ((8, 12), {"feature_maps": MAPS}, "feature maps are for 8×8"),
    ],
)
def test_an_image_of_a_size_that_does_not_fit_is_an_error(size, options, message):
    with pytest.raises(ValueError, match=message):
        conditioned(**options)(torch.randn(2, 3, *size), T, **condition())


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        # the paper's 64 → 256 and 256 → 1024 networks, as ADM's classes count them
        (dict(channels=320, multipliers=[1, 2, 3, 4], blocks=3, in_channels=6), 729_702_083),
        (dict(channels=192, multipliers=[1, 1, 2, 2, 4, 4], blocks=2, in_channels=6), 282_059_139),
    ],
)
def test_published_networks_have_their_sizes(arguments, parameters):
    with torch.device("meta"):
        net = UNet(**arguments)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters


@pytest.mark.parametrize("patch", [1, 2])
@torch.no_grad()
def test_a_bound_network_equals_a_whole_pass(patch):
    net = conditioned(attention_levels=[0, 1], in_channels=6, patch=patch)
    given, concat = condition(), torch.randn(2, 3, 8, 8)
    bound = net.bind(concat=concat, **given)
    for t in torch.tensor([[0, 0], [400, 400], [999, 999]]):
        x = torch.randn(2, 3, 8, 8)
        whole = net(x, t, concat=concat, **given)
        assert torch.equal(whole, net(torch.cat([x, concat], dim=1), t, **given))
        torch.testing.assert_close(bound(x, t), whole, atol=1e-5, rtol=1e-5)


def test_a_bound_network_encodes_its_condition_once():
    net, calls = conditioned(attention_levels=[1]), []
    encoders = [net.conditioning, *(block.context_kv for block in net._attention_blocks())]
    for module in encoders:
        module.register_forward_hook(lambda *_: calls.append(1))
    bound = net.bind(**condition())
    for t in (1, 2, 3):
        bound(torch.randn(2, 3, 8, 8), torch.full((2,), t))
    assert len(calls) == len(encoders)


@pytest.mark.parametrize("levels", [[0], [1], [0, 1]])
def test_feature_maps_get_gradients_and_are_bound(levels):
    net = conditioned(attention_levels=[0, 1], feature_maps={**MAPS, "levels": levels})
    x, given = torch.randn(2, 3, 8, 8), condition()
    whole = net(x, T, **given)
    assert torch.equal(net.bind(**given)(x, T), whole)
    whole.square().sum().backward()
    assert without_gradient(net) == []
    assert all(p.grad.any() for p in net.feature_maps.parameters())


def test_a_feature_map_is_added_to_the_input_of_its_level():
    net = conditioned(feature_maps=MAPS)
    plain = UNet(**TINY, conditioning=CONDITIONING).eval()
    rest = {k: v for k, v in net.state_dict().items() if not k.startswith("feature_maps")}
    plain.load_state_dict(rest)
    x, given = torch.randn(2, 3, 8, 8), condition()
    assert not torch.allclose(net(x, T, **given), plain(x, T, **given))
    (expected,) = net.feature_maps(given["image_embedding"], given["text_embedding"]).values()
    plain.down[1].blocks[0].register_forward_pre_hook(
        lambda _, inputs: (inputs[0] + expected, *inputs[1:])
    )
    torch.testing.assert_close(net(x, T, **given), plain(x, T, **given))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_network_with_feature_maps_takes_bfloat16(autocast):
    net = conditioned(feature_maps=MAPS)
    x, given = torch.randn(2, 3, 8, 8), condition()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.autocast("cpu", enabled=False):
            exact = net(x, T, **given)
        rough = (net if autocast else net.to(torch.bfloat16))(x, T, **given)
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_maps": {**MAPS, "levels": [2]}}, "levels are 0 to 1"),
        ({"feature_maps": {**MAPS, "image_size": 6}}, "multiple of 4"),
        ({"feature_maps": MAPS, "conditioning": None}, "set conditioning"),
        ({"head_width": 12, "attention_levels": [0]}, "must divide the 16 channels"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{**TINY, "patch": 2, "conditioning": CONDITIONING, **options})
