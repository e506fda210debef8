"""What a GPU would do, traced on CUDA tensors without data: see fake_cuda.py."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from script import run_helper

TORCH = Path(torch.__file__).parent
STAGES = ("clip", "prior", "prior_ar", "decoder", "upsampler_256", "upsampler_1024")
VARIANTS = ("prior_paper", "decoder_paper", "upsampler_karlo")
FEATURES = ("features text", "features image", "features effnet_lite0")

# A device guard that does nothing lets autograd record operations on CUDA tensors without data.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>);
}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(620),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the device guard needs g++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has its own guard"),
]


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    where = [f"-I{TORCH}/include", str(source), "-o", str(library), f"-L{TORCH}/lib", "-lc10"]
    command = ["g++", "-std=c++20", "-O0", "-fPIC", "-shared", *where]
    subprocess.run(command, check=True, timeout=280)
    return json.loads(run_helper("fake_cuda.py", library, timeout=600))


def test_every_stage_was_traced(traces):
    trained = {f"train {name}" for name in (*STAGES, *VARIANTS)}
    sampled = {f"sample {name}" for name in (*STAGES[1:], *VARIANTS)}
    assert traces.keys() == {*trained, *sampled, *FEATURES}


@pytest.mark.parametrize("name", [*STAGES, *VARIANTS])
def test_a_step_between_logged_steps_never_waits_for_the_gpu(traces, name):
    assert traces[f"train {name}"]["waits"] == []


@pytest.mark.parametrize("name", [*STAGES[1:], *VARIANTS])
def test_a_sampler_never_waits_for_the_gpu(traces, name):
    table = 1 if name == "prior_paper" else 0  # the analytic variances are read once per call
    assert len(traces[f"sample {name}"]["waits"]) == table, traces[f"sample {name}"]["waits"]


@pytest.mark.parametrize("name", FEATURES)
def test_features_never_wait_for_the_gpu(traces, name):
    assert traces[name]["waits"] == []
    assert traces[name]["out"] == "torch.float32 cuda:0"


@pytest.mark.parametrize("part", ["train", "sample"])
@pytest.mark.parametrize("name", ["decoder", "upsampler_256", "upsampler_1024", *VARIANTS[1:]])
def test_every_convolution_gets_channels_last(traces, name, part):
    trace = traces[f"{part} {name}"]
    assert trace["convolutions"] >= 14 and trace["contiguous"] == []


@pytest.mark.parametrize("name", [*STAGES, *VARIANTS])
def test_weights_averages_statistics_and_the_loss_stay_float32(traces, name):
    trace = traces[f"train {name}"]
    other = {"x0_error": "float64", "alpha_bar": "float64", "vocabulary": "int64"}
    for key, dtype in trace["dtypes"].items():
        assert dtype == f"torch.{other.get(key.split('.')[-1], 'float32')}", key
    assert trace["averages"] == [trace["loss"]] == ["torch.float32"]
    assert trace["devices"] == ["cuda:0"]


@pytest.mark.parametrize("name", [*STAGES[1:], *VARIANTS])
def test_samples_of_float16_networks_are_float32(traces, name):
    assert traces[f"sample {name}"]["out"] == "torch.float32 cuda:0"
