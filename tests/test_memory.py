"""Large models: dtypes, offloading, and errors before loading weights that do not fit."""

import pytest
import tiny_bundle
import torch

from unclip import Cascade, bundle, memory

RUN = {"seeds": [0, 1], "size": 256, "steps": {"prior": 2, "decoder": 2, "upsampler_256": 2}}
PROMPTS = ["a red fox", "a blue house"]
FOUR = {**RUN, "seeds": [0, 1, 2, 3]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bundle.write(tmp_path_factory.mktemp("models") / "tiny")


def test_weight_bytes_are_the_bytes_of_the_loaded_stage(folder):
    for name in ("prior", "decoder"):
        path = bundle.stage_file(folder, name)
        for dtype in (torch.float32, torch.bfloat16):
            stage = bundle.load_stage(path, dtype=dtype)
            held = sum(tensor.nbytes for tensor in stage.state_dict().values())
            assert bundle.weight_bytes(path, dtype) == held


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_give_nearly_the_same_images(folder, dtype):
    plain = Cascade.load(folder, device="cpu").text_to_image(PROMPTS, **RUN)
    other = Cascade.load(folder, device="cpu", dtype=dtype).text_to_image(PROMPTS, **RUN)
    difference = (plain.images[256].float() - other.images[256].float()).abs()
    assert difference.mean() < (4 if dtype == torch.bfloat16 else 0.01)


def test_offload_keeps_one_stage_and_gives_the_same_images(folder):
    plain = Cascade.load(folder, device="cpu").text_to_image(PROMPTS, **RUN)
    cascade = Cascade.load(folder, device="cpu", offload=True)
    offloaded = cascade.text_to_image(PROMPTS, **RUN)
    assert torch.equal(offloaded.images[256], plain.images[256])
    assert list(cascade._stages) == ["upsampler_256"]


def test_stages_that_do_not_fit_are_refused_before_loading(folder, monkeypatch):
    sizes = Cascade.load(folder, device="cpu").weight_bytes("prior", "decoder")
    monkeypatch.setattr(memory, "free_memory", lambda device: max(sizes.values()) + 1)
    cascade = Cascade.load(folder, device="cpu")
    with pytest.raises(MemoryError, match=r"prior .* decoder .* offload"):
        cascade.text_to_image(PROMPTS, **{**RUN, "size": 64})
    assert not cascade._stages
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    with pytest.raises(MemoryError, match="one at a time"):
        Cascade.load(folder, device="cpu", offload=True).stage("prior")


def test_the_clip_must_fit_together_with_the_other_stages(folder, monkeypatch):
    sizes = Cascade.load(folder, device="cpu").weight_bytes("clip", "prior", "decoder")
    monkeypatch.setattr(memory, "free_memory", lambda device: sum(sizes.values()) - 1)
    cascade = Cascade.load(folder, device="cpu")
    with pytest.raises(MemoryError, match=r"prior .* decoder .* clip .* offload"):
        cascade.text_to_image(PROMPTS, **{**RUN, "size": 64})
    offloaded = Cascade.load(folder, device="cpu", offload=True)
    offloaded.text_to_image(PROMPTS, **{**RUN, "size": 64})


def test_free_memory_of_the_cpu_is_plausible():
    free = memory.free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


def test_sample_py_prints_the_size_of_large_weights(folder, tmp_path, monkeypatch, capsys):
    import sample
    from cli import sample_output

    monkeypatch.setattr(sample_output, "LARGE", 0)
    words = ["a red fox", "--model", str(folder), "--out", str(tmp_path), "--size", "64"]
    words += ["--steps", "prior=2", "decoder=2", "--device", "cpu"]
    assert sample.main([*words, "--dtype", "bfloat16", "--offload"]) == 0
    said = capsys.readouterr()
    assert "weights in bfloat16: clip" in said.err
    assert "GiB are free on cpu" in said.err
    (image,) = tmp_path.glob("*.png")
    again = ["again", str(image), "--model", str(folder), "--out", str(tmp_path / "again")]
    assert sample.main([*again, "--device", "cpu"]) == 0
    assert (tmp_path / "again" / image.name).read_bytes() == image.read_bytes()


def test_sample_py_refuses_weights_that_do_not_fit(folder, tmp_path, monkeypatch, capsys):
    import sample

    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    words = ["a red fox", "--model", str(folder), "--out", str(tmp_path), "--device", "cpu"]
    assert sample.main(words) == 2
    assert "GiB are free on cpu" in capsys.readouterr().err


def test_batches_are_halved_until_they_fit_on_the_gpu(folder, monkeypatch):
    plain = Cascade.load(folder, device="cpu").text_to_image(PROMPTS * 2, **FOUR)
    cascade, sizes = Cascade.load(folder, device="cpu"), []
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


def test_a_single_image_that_does_not_fit_is_an_error(folder, monkeypatch):
    cascade = Cascade.load(folder, device="cpu")

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cascade.stage("prior"), "sample", fail)
    with pytest.raises(torch.OutOfMemoryError):
        cascade.prior(["a dog"], seeds=[0], batch_size=1)
