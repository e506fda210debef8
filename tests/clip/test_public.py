import re
import time

import huggingface_hub
import open_clip
import pytest
import tiny_public
import torch
from open_clip.constants import OPENAI_DATASET_MEAN
from safetensors.torch import save_file

from unclip.clip import clip_fingerprint, load_public
from unclip.clip import public as public_module


@pytest.fixture
def weights(tmp_path, monkeypatch):
    return tiny_public.register(tmp_path, monkeypatch)


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_local_file_loads(weights, tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights}, path)
    embedder = load_public("tiny-test", path, normalize=False)
    assert embedder.fingerprint == clip_fingerprint(weights)
    assert embedder.image_mean == OPENAI_DATASET_MEAN and embedder.context_length == 9
    model = open_clip.create_model("tiny-test", load_weights=False).eval()
    model.load_state_dict(weights)
    captions = ["a red apple", "one two three four five six seven eight nine"]
    expected = model.encode_text(open_clip.get_tokenizer("tiny-test")(captions))
    torch.testing.assert_close(embedder.text(captions).text_embedding, expected)
    assert embedder.image(torch.zeros(1, 3, 40, 40)).shape == (1, 16)


@pytest.mark.parametrize("suffix", ["pt", "bin"])
def test_pickled_code_is_not_run(weights, tmp_path, suffix):
    marker = tmp_path / "marker"
    torch.save({"state_dict": weights, "more": Touch(marker)}, tmp_path / f"weights.{suffix}")
    with pytest.raises(ValueError, match=r"plain tensors.*safetensors"):
        load_public("tiny-test", tmp_path / f"weights.{suffix}")
    assert not marker.exists()


def test_weights_of_another_model_and_a_damaged_file_are_errors(weights, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="does not contain the weights of tiny-test"):
        load_public("tiny-test", path)
    path.write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="is damaged"):
        load_public("tiny-test", path)


def test_the_error_for_a_missing_file_has_the_download_command(tmp_path):
    command = "hf download timm/vit_large_patch14_clip_224.openai open_clip_model.safetensors"
    with pytest.raises(FileNotFoundError, match=rf"absent\.safetensors.*{re.escape(command)}"):
        load_public("ViT-L-14", tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-nothing", "openai", "list_models"),
        ("hf-hub:someone/clip", "", "name must be one of"),
        ("ViT-B-16-SigLIP", "webli", "other than CLIP's"),
        ("coca_ViT-B-32", "laion2b_s13b_b90k", "other than CLIP's"),
        ("ViT-B-32", "openay", "tag of ViT-B-32.*openai"),
    ],
)
def test_a_model_that_unclip_cannot_use_is_an_error(name, pretrained, message):
    with pytest.raises(ValueError, match=message):
        load_public(name, pretrained)


def test_without_a_network_it_fails_quickly_with_the_download_command(monkeypatch):
    def unreachable(*arguments, **keywords):
        assert keywords["timeout"] <= 10
        raise OSError("Name or service not known\nmore")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *arguments: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    start = time.monotonic()
    with pytest.raises(FileNotFoundError) as error:
        load_public("ViT-B/32", "laion2b_s34b_b79k")
    assert time.monotonic() - start < 5
    text = str(error.value)
    assert "cannot be downloaded (Name or service not known)" in text
    assert "hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K open_clip_model.safetensors" in text
    assert "pretrained=weights/ViT-B-32/open_clip_model.safetensors" in text


def test_a_tag_sets_the_activation_and_the_normalization(weights, tmp_path, monkeypatch):
    path = tmp_path / "cached.safetensors"
    save_file(weights, path)
    tag = {"hf_hub": "someone/tiny/", "mean": (0.1, 0.2, 0.3), "std": (1, 1, 1), "quick_gelu": True}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag_name: tag)
    requested = []
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda repository, file: requested.append((repository, file)) or str(path),
    )
    embedder = load_public("tiny-test", "tag")
    assert requested == [("someone/tiny", "open_clip_model.safetensors")]
    assert embedder.image_mean == (0.1, 0.2, 0.3)
    assert "QuickGELU" in repr(embedder.model)


def test_a_tag_may_have_other_file_names():
    wanted = public_module._hub_files({"hf_hub": "someone/ViTamin-S/pytorch_model.bin"})
    assert wanted == ("someone/ViTamin-S", ["pytorch_model.safetensors", "pytorch_model.bin"])
