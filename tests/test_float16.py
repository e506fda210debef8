"""A bundle in float16 is half as large, and is the same bundle to everything that loads it."""

import pytest
import tiny_bundle
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import convert
import doctor
from unclip import Cascade
from unclip.bundle import build, initialize, load_embedder, load_stage, read_metadata, save_stage
from unclip.clip import clip_fingerprint, fingerprint

NAMES = (*tiny_bundle.NAMES, "prior_ar")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tiny_bundle.write(tmp_path_factory.mktemp("models") / "tiny", NAMES)
    tiny_bundle.write_judge(folder, steps=5, extra={"license": "CC-BY-SA-4.0", "seconds": 7.5})
    return folder


@pytest.fixture(scope="module")
def half(source):
    out = source.with_name("half")
    assert convert.main(["float16", str(source), str(out)]) == 0
    return out


@pytest.mark.parametrize("name", [*NAMES, "judge"])
def test_only_networks_are_rounded_and_loading_returns_float32_and_the_tables(name, source, half):
    files = [folder / f"{name}.safetensors" for folder in (source, half)]
    old, new = map(load_file, files)
    assert old.keys() == new.keys()
    for key, tensor in new.items():
        network = key.startswith(("network.", "last_network.", "text_encoder.", "model."))
        assert tensor.dtype == (torch.float16 if network else old[key].dtype), key
        assert torch.equal(tensor, old[key].to(tensor.dtype)), key
    first, second = map(load_stage, files)
    dtypes = [{k: t.dtype for k, t in one.state_dict().items()} for one in (first, second)]
    assert dtypes[0] == dtypes[1]
    pairs = zip(second.named_buffers(), first.named_buffers(), strict=True)
    for (key, buffer), (_, original) in pairs:
        assert key in dtypes[1] or torch.equal(buffer, original), key


def test_metadata_survives(source, half):
    old, new = (read_metadata(folder / "judge.safetensors") for folder in (source, half))
    assert new.extra == old.extra == {"license": "CC-BY-SA-4.0", "seconds": 7.5}
    assert (new.stage, new.recipe, new.steps) == (old.stage, old.recipe, old.steps)
    assert new.fingerprint != old.fingerprint  # the images differ in some bits


def test_the_clip_is_the_same_so_stages_can_be_exchanged(source, half, tmp_path):
    files = [folder / "clip.safetensors" for folder in (source, half)]
    assert len({load_embedder(file).fingerprint for file in files}) == 1
    assert len({read_metadata(file).clip_fingerprint for file in files}) == 1
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name, folder in (("clip", source), ("prior", half), ("decoder", half)):
        (mixed / f"{name}.safetensors").write_bytes((folder / f"{name}.safetensors").read_bytes())
    assert Cascade.load(mixed).text_to_image(["a red apple"], seeds=[0], size=64).images[64].any()


def test_the_doctor_accepts_it(half):
    findings = [f for f in doctor.check_bundles(half.parent) if f.message.startswith("half")]
    assert [finding.state for finding in findings] == ["ok"]


def test_a_clips_fingerprint_ignores_what_float16_cannot_hold():
    weights = {"a": torch.tensor([1.0, -3.0]), "b": torch.arange(3)}
    assert clip_fingerprint(weights) == clip_fingerprint(weights | {"a": weights["a"].half()})
    close, far = ({"a": weights["a"] * factor, "b": weights["b"]} for factor in (1 + 1e-5, 1.01))
    assert clip_fingerprint(close) == clip_fingerprint(weights) != clip_fingerprint(far)
    assert fingerprint(close) != fingerprint(weights)


def test_training_can_start_from_it(half):
    fresh = build(tiny_bundle.recipe("prior"))
    initialize(fresh, half / "prior.safetensors", None)
    rounded = load_stage(half / "prior.safetensors").state_dict()
    for key, tensor in fresh.state_dict().items():
        assert tensor.dtype == rounded[key].dtype and torch.equal(tensor, rounded[key]), key


def test_weights_too_large_for_float16_are_refused(tmp_path):
    stage = tiny_bundle.stage("upsampler_256")
    next(stage.network.parameters()).data.flatten()[0] = 1e5
    arguments = {"recipe": tiny_bundle.recipe("upsampler_256"), "steps": 1}
    path = tmp_path / "upsampler_256.safetensors"
    save_stage(path, stage, **arguments, clip_fingerprint=None)
    with pytest.raises(ValueError, match=r"network\.\S+ has values .* finite in torch\.float16"):
        save_stage(path, stage, **arguments, clip_fingerprint=None, dtype=torch.float16)


def test_other_tools_find_their_keys_in_the_header(half):
    with safe_open(half / "upsampler_256.safetensors", "pt") as file:
        header = file.metadata()
    keys = {k.removeprefix("modelspec."): v for k, v in header.items() if k.startswith("modelspec")}
    required = {"sai_model_spec": "1.0.1", "architecture": "unclip-upsampler-256"}
    required |= {"implementation": "unclip", "title": "half upsampler_256"}
    assert required.items() <= keys.items()
    assert keys["resolution"] == "256x256" and keys["date"].endswith("Z")
    with safe_open(half / "judge.safetensors", "pt") as file:
        assert file.metadata()["modelspec.license"] == "CC-BY-SA-4.0"
        assert "modelspec.resolution" not in file.metadata()


def test_a_folder_without_stages_is_an_error(tmp_path, capsys):
    assert convert.main(["float16", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "holds no stage: give the folder of a bundle" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
