"""Large models: dtypes, offloading, and errors before loading weights that do not fit."""

from unittest.mock import Mock

import pytest
import torch

import sample
from unclip import Cascade, bundle, device

RUN = {"seeds": [0, 1], "size": 256, "steps": {"prior": 2, "decoder": 2, "upsampler_256": 2}}
PROMPTS = ["a red fox", "a blue house"]
FOUR = {**RUN, "seeds": [0, 1, 2, 3]}


def test_weight_bytes_are_the_bytes_of_the_loaded_stage(tiny_folder):
    for name in ("prior", "decoder"):
        path = bundle.stage_file(tiny_folder, name)
        for dtype in (torch.float32, torch.bfloat16):
            stage = bundle.load_stage(path, dtype=dtype)
            held = sum(tensor.nbytes for tensor in stage.state_dict().values())
            assert bundle.weight_bytes(path, dtype) == held


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_give_nearly_the_same_images(tiny, tiny_folder, dtype):
    plain = tiny.text_to_image(PROMPTS, **RUN)
    other = Cascade.load(tiny_folder, device="cpu", dtype=dtype).text_to_image(PROMPTS, **RUN)
    difference = (plain.images[256].float() - other.images[256].float()).abs()
    assert difference.mean() < {torch.bfloat16: 4, torch.float16: 1, torch.float64: 0.01}[dtype]


def test_offload_keeps_one_stage_and_gives_the_same_images(tiny, tiny_folder):
    plain = tiny.text_to_image(PROMPTS, **RUN)
    cascade = Cascade.load(tiny_folder, device="cpu", offload=True)
    offloaded = cascade.text_to_image(PROMPTS, **RUN)
    assert torch.equal(offloaded.images[256], plain.images[256])
    assert list(cascade._stages) == ["upsampler_256"]


def test_stages_that_do_not_fit_are_refused_before_loading(tiny, tiny_folder, monkeypatch):
    sizes = tiny.weight_bytes("prior", "decoder")
    monkeypatch.setattr(device, "free_memory", lambda _: max(sizes.values()) + 1)
    cascade = Cascade.load(tiny_folder, device="cpu")
    with pytest.raises(MemoryError, match=r"prior .* decoder .* offload"):
        cascade.text_to_image(PROMPTS, **{**RUN, "size": 64})
    assert not cascade._stages
    monkeypatch.setattr(device, "free_memory", lambda _: 0)
    with pytest.raises(MemoryError, match="one at a time"):
        Cascade.load(tiny_folder, device="cpu", offload=True).stage("prior")


def test_the_clip_must_fit_together_with_the_other_stages(tiny, tiny_folder, monkeypatch):
    sizes = tiny.weight_bytes("clip", "prior", "decoder")
    monkeypatch.setattr(device, "free_memory", lambda _: sum(sizes.values()) - 1)
    cascade = Cascade.load(tiny_folder, device="cpu")
    with pytest.raises(MemoryError, match=r"prior .* decoder .* clip .* offload"):
        cascade.text_to_image(PROMPTS, **{**RUN, "size": 64})
    offloaded = Cascade.load(tiny_folder, device="cpu", offload=True)
    offloaded.text_to_image(PROMPTS, **{**RUN, "size": 64})


def test_sample_py_refuses_weights_that_do_not_fit(tiny_folder, tmp_path, monkeypatch, capsys):
    free = device.free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    monkeypatch.setattr(device, "free_memory", lambda _: 0)
    words = ["a red fox", "--model", str(tiny_folder), "--out", str(tmp_path), "--device", "cpu"]
    assert sample.main(words) == 2
    assert "GiB are free on cpu" in capsys.readouterr().err


def test_batches_are_halved_until_they_fit_on_the_gpu(tiny, tiny_folder, monkeypatch):
    plain = tiny.text_to_image(PROMPTS * 2, **FOUR)
    cascade, sizes = Cascade.load(tiny_folder, device="cpu"), []
    upsampler = cascade.stage("upsampler_256")
    sample = upsampler.sample

    def with_little_memory(condition, **options):
        sizes.append(len(condition["low_res"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(condition, **options)

    monkeypatch.setattr(upsampler, "sample", with_little_memory)
    with pytest.warns(UserWarning, match="upsampler_256: not enough memory; trying batches of 2"):
        images = cascade.text_to_image(PROMPTS * 2, **FOUR).images
    assert sizes == [4, 2, 1, 1, 1, 1]  # the last size for each of the four images
    assert (images[256].float() - plain.images[256].float()).abs().max() <= 1


def test_a_single_image_that_does_not_fit_is_an_error(tiny_folder, monkeypatch):
    cascade = Cascade.load(tiny_folder, device="cpu")
    fail = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(cascade.stage("prior"), "sample", fail)
    with pytest.raises(torch.OutOfMemoryError):
        cascade.prior(["a dog"], seeds=[0], batch_size=1)
