"""Folders of diffusers' components that are incomplete, damaged, or of other models."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_files import assert_same_stage

import convert
from unclip.interop import convert_karlo


@pytest.fixture
def folder(karlo, tmp_path):
    """A copy of the components' folder that a test may change."""
    return shutil.copytree(karlo.folder, tmp_path / "copy")


def change_weights(folder, name, edit):
    (path,) = (folder / name).glob("*.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name, edit, message",
    [
        ("decoder", lambda t: t.pop("conv_in.bias"), r"decoder lacks conv_in\.bias"),
        ("prior", lambda t: t.update(odd=torch.zeros(1)), r"prior has an unexpected tensor odd"),
        (
            "super_res_last",
            lambda t: t.update({"conv_out.bias": torch.zeros(4)}),
            r"super_res_last: conv_out\.bias \[4\] does not fit .*conv_out\.bias \[3\]",
        ),
        (
            "text_encoder",
            lambda t: t.update({"text_projection.weight": torch.zeros(3, 16)}),
            r"text_encoder: text_projection\.weight \[3, 16\] does not fit .* \[16, 16\]",
        ),
        (
            "prior",
            lambda t: t.update({"transformer_blocks.0.attn1.to_q.bias": torch.zeros(4)}),
            r"prior: transformer_blocks\.0\.attn1\.to_q\.bias \[4\], .* does not fit .* \[48\]",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(karlo, folder, tmp_path, name, edit, message):
    change_weights(folder, name, edit)
    with pytest.raises(ValueError, match=message):
        convert_karlo(folder, tmp_path / "out", karlo.recipes)


def test_the_encoders_can_be_in_another_folder(karlo, folder, tmp_path):
    shutil.rmtree(folder / "image_encoder")
    convert_karlo(folder, tmp_path / "out", karlo.recipes, clip=karlo.folder)
    assert_same_stage(tmp_path / "out", karlo.models, "clip")


def test_pickled_weights_give_the_same_stage(karlo, folder, tmp_path):
    path = folder / "decoder" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    convert_karlo(folder, tmp_path / "out", karlo.recipes)
    assert_same_stage(tmp_path / "out", karlo.models, "decoder")


def test_a_pickle_with_more_than_tensors_is_not_loaded(karlo, folder, tmp_path):
    path = folder / "decoder" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    torch.save({"conv_in.weight": print}, path.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"\.bin is damaged or contains more than tensors"):
        convert_karlo(folder, tmp_path / "out", karlo.recipes)


def test_convert_py_names_the_missing_file(tmp_path, capsys):
    assert convert.main(["karlo", str(tmp_path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convert.py: ") and "is missing: copy the whole folder again" in error
