"""Folders out and in again, and folders that are not what they should be."""

import json
import shutil

import pytest
import torch
from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from safetensors.torch import load_file, save_file
from same_stage import assert_same_stage
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from unclip import bundle
from unclip.clip import Tokenizer
from unclip.interop import STAGES, convert_karlo, convert_to_diffusers

CLASSES = {
    "prior": PriorTransformer,
    "decoder": UNet2DConditionModel,
    "text_proj": UnCLIPTextProjModel,
    "super_res_first": UNet2DModel,
    "super_res_last": UNet2DModel,
    "text_encoder": CLIPTextModelWithProjection,
    "image_encoder": CLIPVisionModelWithProjection,
}


@pytest.fixture(scope="module")
def written(karlo, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "diffusers"
    convert_to_diffusers(karlo.models, out)
    return out


@pytest.fixture
def copied(karlo, tmp_path):
    return shutil.copytree(karlo.folder, tmp_path / "copy")


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_written_loads_with_the_class_that_it_is_for(karlo, written, name):
    loaded = CLASSES[name].from_pretrained(written / name)
    expected = getattr(karlo.parts, name).state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    theirs = json.loads((karlo.folder / name / "config.json").read_text())
    ours = json.loads((written / name / "config.json").read_text())
    ignored = {"_diffusers_version", "transformers_version", "pad_token_id", "dropout"}
    ignored |= {"logit_scale_init_value"}
    for key in (ours.keys() & theirs.keys()) - ignored:
        assert ours[key] == theirs[key], key


def test_out_and_in_again_is_the_same_to_the_bit(karlo, written, tmp_path):
    convert_karlo(written, tmp_path, karlo.recipes)
    for name in STAGES:
        assert_same_stage(tmp_path, karlo.models, name)


def test_the_tokenizer_is_karlos(written):
    tokenizer = CLIPTokenizer.from_pretrained(written / "tokenizer")
    texts = ["A red fox, 2 Häuser", ""]
    rows = tokenizer(texts, padding="max_length", max_length=24, truncation=True)
    tokens, mask = Tokenizer(24)(texts)
    assert torch.equal(torch.tensor(rows["input_ids"]), tokens)
    assert torch.equal(torch.tensor(rows["attention_mask"]).bool(), mask)


def test_schedulers_and_processor_load(written):
    prior = UnCLIPScheduler.from_pretrained(written / "prior_scheduler").config
    assert (prior.prediction_type, prior.clip_sample_range) == ("sample", 10.0)
    decoder = UnCLIPScheduler.from_pretrained(written / "decoder_scheduler").config
    assert (decoder.prediction_type, decoder.variance_type) == ("epsilon", "learned_range")
    processor = CLIPImageProcessor.from_pretrained(written / "feature_extractor")
    assert processor.crop_size["height"] == 32
    index = json.loads((written / "model_index.json").read_text())
    assert index["text_proj"] == ["unclip", "UnCLIPTextProjModel"]


def test_either_index_is_read(karlo, copied, tmp_path):
    for library in ("unclip", "diffusers"):
        index = {"text_proj": [library, "UnCLIPTextProjModel"]}
        (copied / "model_index.json").write_text(json.dumps(index))
        convert_karlo(copied, tmp_path / library, karlo.recipes)
        path = bundle.stage_file(tmp_path / library, "decoder")
        assert bundle.read_metadata(path).stage == "decoder"


def change(folder, name, edit):
    """Rewrites a component's weights."""
    (path,) = (folder / name).glob("*.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name, edit, message",
    [
        ("decoder", lambda t: t.pop("conv_in.bias"), r"decoder lacks conv_in\.bias"),
        ("prior", lambda t: t.update(odd=torch.zeros(1)), r"prior has a tensor .*: odd"),
        (
            "super_res_last",
            lambda t: t.update({"conv_out.bias": torch.zeros(4)}),
            r"super_res_last: conv_out\.bias has shape \[4\], not \[3\]",
        ),
        (
            "text_encoder",
            lambda t: t.update({"text_projection.weight": torch.zeros(3, 16)}),
            r"text_encoder: text_projection\.weight has shape \[3, 16\], not \[16, 16\]",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(karlo, copied, tmp_path, name, edit, message):
    change(copied, name, edit)
    with pytest.raises(ValueError, match=message):
        convert_karlo(copied, tmp_path / "out", karlo.recipes)


def test_a_missing_component_is_named(karlo, copied, tmp_path):
    shutil.rmtree(copied / "image_encoder")
    with pytest.raises(FileNotFoundError, match="image_encoder"):
        convert_karlo(copied, tmp_path / "out", karlo.recipes)
    convert_karlo(copied, tmp_path / "out", karlo.recipes, clip=karlo.folder)
    (copied / "prior" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"prior.config\.json"):
        convert_karlo(copied, tmp_path / "out", karlo.recipes)


@pytest.mark.parametrize(
    "where, key, value",
    [
        ("prior/config.json", "added_emb_type", None),
        ("decoder/config.json", "act_fn", "gelu"),
        ("super_res_first/config.json", "norm_eps", 1e-6),
        ("text_encoder/config.json", "vocab_size", 100),
        ("image_encoder/config.json", "hidden_act", "gelu"),
        ("decoder_scheduler/scheduler_config.json", "prediction_type", "sample"),
    ],
)
def test_a_setting_without_a_counterpart_is_named(karlo, copied, tmp_path, where, key, value):
    path = copied / where
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=f"{where}: {key} is"):
        convert_karlo(copied, tmp_path / "out", karlo.recipes)


def test_pickled_weights_are_read_as_tensors_only(karlo, copied, tmp_path):
    path = copied / "decoder" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    convert_karlo(copied, tmp_path / "out", karlo.recipes)
    assert_same_stage(tmp_path / "out", karlo.models, "decoder")
    torch.save({"conv_in.weight": print}, path.with_suffix(".bin"))
    with pytest.raises(ValueError, match="more than tensors"):
        convert_karlo(copied, tmp_path / "out", karlo.recipes)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"normalize": True}, "normalize is True"),
        ({"learn_null_text": True}, r"null_text\.learned is True"),
    ],
)
def test_what_diffusers_cannot_say_is_refused(karlo, tmp_path, change, message):
    models = shutil.copytree(karlo.models, tmp_path / "models")
    path = bundle.stage_file(models, "prior")
    metadata, stage = bundle.read_metadata(path), bundle.load_stage(path)
    bundle.save_stage(
        path,
        stage,
        recipe={**metadata.recipe, **change},
        steps=0,
        clip_fingerprint=metadata.clip_fingerprint,
    )
    with pytest.raises(ValueError, match=message):
        convert_to_diffusers(models, tmp_path / "out")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"prior\.safetensors is missing"):
        convert_to_diffusers(models, tmp_path / "out")
