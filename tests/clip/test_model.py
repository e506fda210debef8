import open_clip
import pytest
import torch

from unclip.clip import build_clip, encode_text, fingerprint, prepare_image

VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 600, "width": 24, "heads": 2, "layers": 2}
SMALL = {"size": 16, "mean": (0.0,) * 3, "std": (1.0,) * 3}


@pytest.fixture
def tokens():
    """Return captions of different lengths, which end with 599."""
    tokens = torch.randint(1, 598, (5, 12))
    tokens[:, 0] = 598
    for row in range(5):
        tokens[row, 3 + row :] = 0
        tokens[row, 3 + row] = 599
    return tokens


@pytest.fixture
def model():
    return build_clip(embed_dim=20, vision=VISION, text=TEXT)


@pytest.mark.parametrize("train", [True, False])
def test_the_embedding_equals_open_clips(train, model, tokens):
    model.train(train)
    states, embedding = encode_text(model, tokens)
    torch.testing.assert_close(embedding, model.encode_text(tokens))
    assert states.shape == (5, 12, 24) and embedding.shape == (5, 20)


@pytest.mark.parametrize(
    "settings",
    [{}, {"pool_type": "eos", "eos_id": 599}, {"pool_type": "last", "no_causal_mask": True},
     {"proj_bias": True}, {"proj_type": "none"}],
)  # fmt: skip
def test_the_embedding_of_a_custom_text_tower_equals_open_clips(settings, tokens):
    model = open_clip.model.CustomTextCLIP(24, VISION, TEXT | settings).eval()
    torch.testing.assert_close(encode_text(model, tokens).text_embedding, model.encode_text(tokens))


def test_causal_text_may_be_cut_behind_the_end_tokens(model, tokens):
    whole, short = encode_text(model, tokens), encode_text(model, tokens[:, :8])
    torch.testing.assert_close(short.text_embedding, whole.text_embedding)
    torch.testing.assert_close(short.text_states, whole.text_states[:, :8])


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        ({"width": 33}, {}),
        ({"image_size": 40}, {}),
        ({"layers": [1, 1, 1, 1], "image_size": 48}, {}),
        ({}, {"heads": 5}),
    ],
)
def test_sizes_that_do_not_divide_are_errors(vision, text):
    with pytest.raises(ValueError, match="must divide"):
        build_clip(embed_dim=20, vision=VISION | vision, text=TEXT | text)


def test_prepared_images_have_clips_normalization_and_size():
    gray = torch.zeros(2, 3, 40, 40)  # 0.5 in [0, 1]
    prepared = prepare_image(gray, size=16, mean=(0.5, 0.25, 0.75), std=(0.5, 0.25, 0.125))
    expected = torch.tensor([0.0, 1.0, -2.0]).view(1, 3, 1, 1).expand(2, 3, 16, 16)
    torch.testing.assert_close(prepared, expected)


def test_uint8_and_float_images_are_prepared_equally():
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for given in (pixels, pixels.float() / 127.5 - 1):
        torch.testing.assert_close(prepare_image(given, **SMALL), pixels.float() / 255)


def test_shrinking_an_image_is_antialiased():
    lines = torch.ones(1, 3, 128, 128)
    lines[..., ::2] = -1  # without antialiasing the result would be black or white
    inner = prepare_image(lines, **SMALL)[..., 2:-2]
    torch.testing.assert_close(inner, torch.full_like(inner, 0.5), atol=0.02, rtol=0)


def test_a_wide_image_is_cropped_to_its_center():
    wide = torch.full((1, 3, 16, 32), -1.0)
    wide[..., 8:24] = 1.0
    torch.testing.assert_close(prepare_image(wide, **SMALL), torch.ones(1, 3, 16, 16))


def test_the_fingerprint_depends_on_values_names_types_and_shapes():
    weights = {"b": torch.zeros(2, 3), "a": torch.tensor(1.0), "c": torch.arange(3)}
    first = fingerprint(weights)
    assert len(first) == 16 and int(first, 16) >= 0
    assert first == fingerprint(dict(reversed(weights.items())))
    assert first == fingerprint(weights | {"b": torch.zeros(3, 2).T})  # another layout in memory
    changed = [
        weights | {"a": torch.tensor(1.0 + 2**-20)},
        weights | {"b": torch.zeros(3, 2)},
        weights | {"b": torch.zeros(2, 3, dtype=torch.int32)},
        weights | {"c": torch.arange(3, dtype=torch.int32)},
        {"b": weights["b"], "a": weights["a"], "d": weights["c"]},
    ]
    assert len({first, *map(fingerprint, changed)}) == 6
    assert fingerprint({"a": torch.zeros(2, dtype=torch.bfloat16), "b": torch.empty(0)})
