"""What scripts set up on a device, the dtype of networks, and what stays float32 in them."""

from pathlib import Path

import pytest
import tiny_bundle
import torch

from unclip import Cascade
from unclip.clip import ClipEmbedder
from unclip.device import DTYPES, device_of, resolve_dtype, set_up_device

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch):
    """Let there be a GPU where it is asked for, and restore what is set."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_float32_products_use_tf32_on_a_gpu_and_training_times_convolutions(gpu):
    set_up_device()
    assert torch.get_float32_matmul_precision() == "high"
    assert not torch.backends.cudnn.benchmark
    set_up_device(training=True)
    assert torch.backends.cudnn.benchmark


def test_nothing_is_set_up_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", pytest.fail)
    set_up_device(training=True)


def test_auto_is_float16_on_a_gpu_and_float32_elsewhere():
    assert resolve_dtype("auto", "cuda:1") == torch.float16
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert [resolve_dtype(name, "cpu") for name in DTYPES[1:]] == [
        *(torch.float32, torch.bfloat16, torch.float16)
    ]
    assert resolve_dtype(torch.bfloat16, "cuda") == torch.bfloat16
    with pytest.raises(ValueError, match="dtype is 'half'; it can be auto, float32"):
        resolve_dtype("half", "cpu")


def test_a_trainer_uses_a_gpu_if_there_is_one(gpu, monkeypatch):
    assert [device_of(name) for name in ("auto", "gpu", "cpu")] == ["cuda", "cuda", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["prior", "decoder", "upsampler_256"])
def test_the_sampler_computes_in_float32_whatever_the_networks_do(name, dtype, monkeypatch):
    stage = tiny_bundle.stage(name).eval()
    stage.network.to(dtype)
    seen, predict = [], stage.diffusion.predict

    def spy(output, x_t, t, clip_range=None):
        prediction = predict(output, x_t, t, clip_range)
        seen.extend([x_t.dtype, prediction.x0.dtype, prediction.eps.dtype])
        assert output.dtype == dtype
        return prediction

    monkeypatch.setattr(stage.diffusion, "predict", spy)
    batch = {
        "text_embedding": torch.randn(1, tiny_bundle.EMBEDDING_DIM),
        "text_states": torch.randn(1, tiny_bundle.CONTEXT_LENGTH, tiny_bundle.TEXT_WIDTH),
        "text_mask": torch.ones(1, tiny_bundle.CONTEXT_LENGTH, dtype=torch.bool),
        "low_res": torch.rand(1, 3, 16, 16),
    }
    out = stage.sample(stage.condition(batch), generators=[torch.Generator()])
    assert {out.dtype, *seen} == {torch.float32}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_only_the_networks_of_a_bundle_are_converted(dtype, tiny_folder):
    cascade = Cascade.load(tiny_folder, device="cpu", dtype=dtype)
    for name in ("prior", "decoder", "upsampler_256"):
        for key, tensor in cascade.stage(name).state_dict().items():
            own = key.startswith(("network.", "text_encoder."))
            assert tensor.dtype == (getattr(torch, dtype) if own else torch.float32), key
    text = cascade.embedder.text(["a cat"])
    assert text.text_states.dtype == text.text_embedding.dtype == torch.float32
    image = cascade.embedder.image(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert image.dtype == torch.float32


def test_an_embedder_without_its_image_tower_still_encodes_captions():
    embedder: ClipEmbedder = tiny_bundle.stage("clip").embedder()
    before = embedder.text(["a cat"]).text_embedding
    parameters = sum(p.numel() for p in embedder.model.parameters())
    embedder.drop_image_tower()
    embedder._cache.clear()
    assert torch.equal(embedder.text(["a cat"]).text_embedding, before)
    assert sum(p.numel() for p in embedder.model.parameters()) < parameters
