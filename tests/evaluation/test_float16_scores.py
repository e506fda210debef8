"""float16 changes a bundle's scores by less than their intervals."""

import math

import pytest
import torch
from tiny_evaluation import METRICS, context_of

import convert
from unclip.bundle import load_stage
from unclip.evaluation.measurement import run


@pytest.fixture(scope="module")
def half(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "half"
    convert.to_float16(tiny_model, folder)
    return folder


def test_distances_and_retrieval_stay_within_their_intervals(tiny_model, half, squares, tmp_path):
    found = []
    for model in (tiny_model, half):
        context = context_of(model, squares, tmp_path / model.name)
        found.append(run(METRICS, context).scores)
    for name in ("fd_patches", "kid_patches", "clip_score_judge", "r_precision_judge"):
        low, high = found[0][name].interval
        assert low <= found[1][name].value <= high, name
        assert abs(found[1][name].value - found[0][name].value) <= (high - low) / 2, name


@pytest.mark.parametrize("name", ["upsampler_256", "upsampler_1024"])
def test_psnr_changes_by_less_than_its_interval(name, tiny_model, half):
    true = torch.rand(8, 3, 128, 128) * 2 - 1
    low_res = torch.nn.functional.avg_pool2d(true, 4)
    psnr = []
    for model in (tiny_model, half):
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(true))]
        stage = load_stage(model / f"{name}.safetensors")
        sampled = stage.sample({"low_res": low_res}, generators=generators)
        psnr.append(10 * (4 / (sampled - true).square().mean((1, 2, 3))).log10())
    interval = 1.96 * psnr[0].std() / math.sqrt(len(true))
    assert (psnr[1] - psnr[0]).mean().abs() < interval
