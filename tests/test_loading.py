"""How a stage's weights come off the disk, and how a run starts from them."""

import sys
from pathlib import Path

import pytest
import tiny_bundle
import torch

from unclip import bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bundle.write(tmp_path_factory.mktemp("models") / "tiny")


def mapped(path, pointer: int) -> bool:
    """Whether an address lies in this process's view of a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            if first <= pointer < last:
                return True
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["prior", "decoder", "upsampler_256"])
def test_weights_on_a_cpu_are_pages_of_the_file(folder, name):
    path = bundle.stage_file(folder, name)
    stage = bundle.load_stage(path)
    assert all(mapped(path, tensor.data_ptr()) for tensor in stage.parameters())


def test_the_embedder_holds_one_copy(folder):
    path = bundle.stage_file(folder, "clip")
    embedder = bundle.load_embedder(path)
    assert mapped(path, embedder.model.visual.conv1.weight.data_ptr())
    half = bundle.load_embedder(path, dtype=torch.bfloat16)
    assert half.model.visual.conv1.weight.dtype == torch.bfloat16
    assert half.fingerprint == embedder.fingerprint  # of the weights as they were written


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
