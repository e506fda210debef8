"""Loading a stage's weights, and initializing a run from them."""

import sys
from pathlib import Path

import pytest
import tiny_bundle
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unclip import bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bundle.write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("length", [1, 9, 17, 25, 33, 41, 49, 57])
def test_samples_do_not_depend_on_the_length_of_the_header(folder, tmp_path, length):
    path = bundle.stage_file(folder, "upsampler_256")
    padded = tmp_path / path.name
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), "padding": "x" * length}
    save_file(load_file(path), padded, metadata=metadata)
    low_res = torch.linspace(-1, 1, 3 * 24 * 24).reshape(1, 3, 24, 24)

    def sample(path):
        generators = [torch.Generator().manual_seed(0)]
        return bundle.load_stage(path).sample({"low_res": low_res}, generators=generators)

    assert torch.equal(sample(padded), sample(path))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["prior", "decoder", "upsampler_256"])
def test_loaded_weights_do_not_need_their_file(folder, name):
    path = bundle.stage_file(folder, name)
    stage = bundle.load_stage(path)
    assert stage.state_dict()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_the_embedder_holds_one_copy(folder):
    path = bundle.stage_file(folder, "clip")
    stage = bundle.load_stage(path)
    embedder = stage.embedder(share=True)
    assert embedder.model.visual.conv1.weight is stage.model.visual.conv1.weight
    half = bundle.load_embedder(path, dtype=torch.bfloat16)
    assert half.model.visual.conv1.weight.dtype == torch.bfloat16
    assert half.fingerprint == embedder.fingerprint  # of the weights as they were written


@pytest.mark.parametrize("name", ["clip", "prior", "decoder"])
def test_loading_computes_no_random_weights(folder, name, monkeypatch):
    devices = []
    for rule in ("kaiming_uniform_", "normal_", "xavier_uniform_"):
        monkeypatch.setattr(torch.nn.init, rule, lambda t, *_, **__: devices.append(t.device.type))
    bundle.load_stage(bundle.stage_file(folder, name))
    assert set(devices) == {"meta"}


def test_networks_take_the_dtype_and_the_rest_stays_float32(folder):
    stage = bundle.load_stage(bundle.stage_file(folder, "decoder"), dtype=torch.bfloat16)
    assert {p.dtype for p in stage.network.parameters()} == {torch.bfloat16}
    assert stage.image_scaling.mean.dtype == stage.null_image_embedding.dtype == torch.float32
    assert stage.diffusion.alpha_bar.dtype == torch.float64
    assert stage.diffusion.alpha_bar.device.type == "cpu"


def test_a_stage_starts_from_a_file(folder):
    path = bundle.stage_file(folder, "prior")
    fresh = bundle.build(tiny_bundle.recipe("prior"))
    bundle.initialize(fresh, path, bundle.read_metadata(path).clip_fingerprint)
    loaded = bundle.load_stage(path).state_dict()
    for key, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, loaded[key])
    assert all(parameter.requires_grad for parameter in fresh.parameters())


def test_a_start_that_does_not_fit_says_what(folder):
    prior = bundle.stage_file(folder, "prior")
    wider = tiny_bundle.recipe("prior")
    wider["network"]["width"] = 32
    with pytest.raises(ValueError, match=r"network\.\S+ is float"):
        bundle.initialize(bundle.build(wider), prior, None)
    with pytest.raises(ValueError, match="holds the stage prior, not decoder"):
        bundle.initialize(bundle.build(tiny_bundle.recipe("decoder")), prior, None)
    with pytest.raises(ValueError, match="trained with CLIP"):
        bundle.initialize(bundle.build(tiny_bundle.recipe("prior")), prior, "0" * 16)
    with pytest.raises(FileNotFoundError, match=r"absent.prior\.safetensors"):
        bundle.initialize(bundle.build(wider), folder / "absent" / "prior.safetensors", None)
