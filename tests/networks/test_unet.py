import pytest
import torch

from unclip.networks import UNet

CONDITIONING = {"image_embedding": 8, "text_states": 12, "context_width": 16}
TINY = dict(channels=16, multipliers=[1, 2], blocks=1, head_width=8, groups=8)


def condition(batch: int = 2, length: int = 5) -> dict[str, torch.Tensor]:
    return {
        "image_embedding": torch.randn(batch, 8),
        "text_embedding": torch.randn(batch, 8),
        "text_states": torch.randn(batch, length, 12),
        "text_mask": torch.arange(length)[None].expand(batch, -1) < 3,
    }


def randomised(net: UNet) -> UNet:
    """Every parameter random, so that nothing hides behind a zero."""
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


@pytest.mark.parametrize("patch", [1, 2])
def test_starts_at_zero_and_keeps_the_size(patch):
    net = UNet(**TINY, conditioning=CONDITIONING, attention_levels=[1], out_channels=6, patch=patch)
    out = net(torch.randn(2, 3, 16, 24), torch.tensor([0, 999]), **condition())
    assert out.shape == (2, 6, 16, 24)
    assert (out == 0).all()


def test_padding_tokens_are_not_seen_and_real_ones_are():
    net = randomised(UNet(**TINY, conditioning=CONDITIONING, attention_levels=[1]))
    x, t, given = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), condition()
    out = net(x, t, **given)
    padded = {**given, "text_states": given["text_states"].clone()}
    padded["text_states"][:, 3:] += 100
    torch.testing.assert_close(net(x, t, **padded), out)
    padded["text_states"][:, 2] += 1
    assert not torch.allclose(net(x, t, **padded), out)


@pytest.mark.parametrize("name", ["image_embedding", "text_embedding"])
def test_embeddings_matter(name):
    net = randomised(UNet(**TINY, conditioning=CONDITIONING, attention_levels=[1]))
    x, t, given = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), condition()
    changed = net(x, t, **{**given, name: given[name] + 1})
    assert not torch.allclose(changed, net(x, t, **given))


def test_every_parameter_gets_a_gradient():
    net = randomised(UNet(**TINY, conditioning=CONDITIONING, attention_levels=[0, 1]))
    net(torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), **condition()).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_without_attention_it_is_convolutional():
    """Away from the borders a crop's output is the whole's, but for the norms' statistics."""
    net = randomised(UNet(**TINY, in_channels=6))
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.GroupNorm):
                setattr(parent, name, torch.nn.Identity())
    x, t, far = torch.randn(1, 6, 112, 96), torch.tensor([3]), 34  # of the receptive field
    with torch.no_grad():
        whole, crop = net(x, t)[..., 16:96, 8:88], net(x[..., 16:96, 8:88], t)
    inside = (..., slice(far, -far), slice(far, -far))
    scale = whole.std().item()
    torch.testing.assert_close(crop[inside], whole[inside], atol=1e-5 * scale, rtol=1e-5)
    assert (crop - whole).abs().max() > 0.1 * scale


def test_a_size_that_does_not_fit_names_the_stride():
    with pytest.raises(ValueError, match="multiples of 4"):
        UNet(**TINY, patch=2)(torch.randn(1, 3, 10, 8), torch.tensor([0]))


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        # Karlo's decoder, with its null vector of 768, which the stage holds here
        (
            dict(
                channels=320,
                multipliers=[1, 2, 3, 4],
                blocks=3,
                attention_levels=[1, 2, 3],
                out_channels=6,
                dropout=0.1,
                conditioning=dict(image_embedding=768, text_states=768, context_width=1536),
            ),
            893_318_086 - 768,
        ),
        # Karlo's 64 → 256 network
        (
            dict(
                channels=320, multipliers=[1, 2, 3, 4], blocks=3, in_channels=6, scale_shift=False
            ),
            691_579_523,
        ),
        # the paper's 64 → 256 and 256 → 1024 networks, as ADM's classes count them
        (dict(channels=320, multipliers=[1, 2, 3, 4], blocks=3, in_channels=6), 729_702_083),
        (dict(channels=192, multipliers=[1, 1, 2, 2, 4, 4], blocks=2, in_channels=6), 282_059_139),
    ],
)
def test_published_sizes(arguments, parameters):
    with torch.device("meta"):
        net = UNet(**arguments)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters


@pytest.mark.parametrize("patch", [1, 2])
def test_a_prepared_network_gives_what_a_whole_pass_gives(patch):
    options = dict(conditioning=CONDITIONING, attention_levels=[0, 1], in_channels=6, patch=patch)
    net = randomised(UNet(**TINY, **options))
    given, constant = condition(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        network = net.bind(concat=constant, **given)
        for t in (0, 400, 999):
            x, times = torch.randn(2, 3, 8, 8), torch.full((2,), t)
            whole = net(x, times, concat=constant, **given)
            joined = net(torch.cat([x, constant], dim=1), times, **given)
            assert torch.equal(whole, joined)
            torch.testing.assert_close(network(x, times), whole, atol=1e-5, rtol=1e-5)


def test_a_prepared_network_reads_its_condition_once():
    net = randomised(UNet(**TINY, conditioning=CONDITIONING, attention_levels=[1]))
    read = []
    for module in [net.conditioning, *net._attention_blocks()]:
        part = module if module is net.conditioning else module.context_kv
        part.register_forward_hook(lambda *_: read.append(1))
    network = net.bind(**condition())
    once = len(read)
    for t in (1, 2, 3):
        network(torch.randn(2, 3, 8, 8), torch.full((2,), t))
    assert len(read) == once == 1 + len(list(net._attention_blocks()))


@pytest.mark.parametrize("levels", [[0], [1], [0, 1]])
def test_feature_maps_get_gradients_and_prepare_as_a_whole_pass_does(levels):
    maps = dict(levels=levels, hidden=8, rank=3, image_size=8)
    net = randomised(
        UNet(**TINY, conditioning=CONDITIONING, attention_levels=[0, 1], feature_maps=maps)
    )
    given, x, t = condition(), torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    whole = net(x, t, **given)
    assert torch.equal(net.bind(**given)(x, t), whole)
    whole.square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    assert all(p.grad.any() for p in net.feature_maps.parameters())


def test_a_feature_map_is_added_to_the_input_of_its_level():
    """Adding the maps by hand to the plain U-Net with the same weights gives the same output."""
    maps = dict(levels=[1], hidden=8, rank=3, image_size=8)
    net = randomised(UNet(**TINY, conditioning=CONDITIONING, feature_maps=maps))
    plain = UNet(**TINY, conditioning=CONDITIONING).eval()
    rest = {k: v for k, v in net.state_dict().items() if not k.startswith("feature_maps")}
    plain.load_state_dict(rest)
    given, x, t = condition(), torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    assert not torch.allclose(net(x, t, **given), plain(x, t, **given))
    (expected,) = net.feature_maps(given["image_embedding"], given["text_embedding"]).values()
    plain.down[1].blocks[0].register_forward_pre_hook(
        lambda _, inputs: (inputs[0] + expected, *inputs[1:])
    )
    torch.testing.assert_close(net(x, t, **given), plain(x, t, **given))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_network_with_feature_maps_takes_bfloat16(autocast):
    maps = dict(levels=[0, 1], hidden=8, rank=3, image_size=8)
    net = randomised(UNet(**TINY, conditioning=CONDITIONING, feature_maps=maps))
    given, x, t = condition(), torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.autocast("cpu", enabled=False):
            exact = net(x, t, **given)
        rough = (net if autocast else net.to(torch.bfloat16))(x, t, **given)
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_feature_maps_that_do_not_fit_say_so():
    options = dict(**TINY, patch=2, conditioning=CONDITIONING)
    net = UNet(**options, feature_maps=dict(levels=[1], hidden=8, rank=3, image_size=8))
    for height, width in ((16, 16), (8, 12)):
        with pytest.raises(ValueError, match="feature maps are for 8×8"):
            net(torch.randn(2, 3, height, width), torch.tensor([0, 1]), **condition())
    with pytest.raises(ValueError, match="levels are 0 to 1"):
        UNet(**options, feature_maps=dict(levels=[2], hidden=8, rank=3, image_size=8))
    with pytest.raises(ValueError, match="multiple of 4"):
        UNet(**options, feature_maps=dict(levels=[1], hidden=8, rank=3, image_size=6))
    with pytest.raises(ValueError, match="set conditioning"):
        UNet(**TINY, feature_maps=dict(levels=[1], hidden=8, rank=3, image_size=8))


def test_a_head_width_that_does_not_divide_the_channels_says_so():
    with pytest.raises(ValueError, match="must divide the 16 channels"):
        UNet(**{**TINY, "head_width": 12}, attention_levels=[0])
