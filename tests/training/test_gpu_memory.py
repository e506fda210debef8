"""Tests for a GPU; benchmarks/gpu.sh runs them."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import plan
from cli import planning
from unclip import bundle

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["decoder", "prior", "upsampler_256"])
def test_the_planned_memory_is_that_of_a_gpu(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = plan._to_dict(compose("plan", [f"stage={name}", "scale=emoji"]))
    step = plan.measure(config)
    stage = bundle.build(config["model"]).cuda().train()
    batch = {
        key: value.cuda().zero_() if torch.is_tensor(value) else value
        for key, value in planning.example_batch(config, stage).items()
    }
    for _ in range(2):  # the gradients of the first step live during the second one
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = stage.loss(batch)["loss"]
        stage.zero_grad(set_to_none=True)
        loss.backward()
    expected = step.weights + step.gradients + step.activations
    assert torch.cuda.max_memory_allocated() == pytest.approx(expected, rel=0.2)
