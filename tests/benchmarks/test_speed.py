import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import plan
from unclip import bundle

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(monkeypatch):
    """Import a module from the folder of the benchmarks."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_script_for_a_gpu_runs_on_a_cpu_with_tiny_networks(tmp_path):
    environment = os.environ | {"QUICK": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "exit code" not in done.stdout, done.stdout + done.stderr
    everything = json.loads((tmp_path / "all.json").read_text())
    assert everything.keys() == {"networks", "loader"}
    assert all(row["images/s"] > 0 for row in everything["loader"]["rows"])
    assert "| upsampler_256 | quick | train " in (tmp_path / "all.md").read_text()
    results = everything["networks"]
    assert results["machine"]["cores"] >= 1 and results["versions"]["torch"] == torch.__version__
    assert {row["stage"] for row in results["rows"]} == {"prior", "upsampler_256", "clip"}
    prior = [row for row in results["rows"] if row["stage"] == "prior"]
    rows = {(row["measure"], row["contender"]): row for row in prior}
    contenders = {"unclip", "diffusers", "DALLE2-pytorch"} - results["not_measured"].keys()
    measures = {"train", "step", "sample"}
    assert rows.keys() == {(measure, name) for measure in measures for name in contenders}
    assert all(row["ms"] > 0 and row["size"] == "quick" for row in rows.values())
    assert all(rows[measure, "unclip"]["ratio"] == 1 for measure in measures)
    ours = rows["train", "unclip"]
    assert 0 < ours["MFU"] < 1 and 4 * 4 * ours["parameters"] < ours["planned GiB"] * 2**30
    ours, theirs = (rows["train", name]["parameters"] for name in ("unclip", "diffusers"))
    assert theirs - ours == 2 * 32  # the statistics that diffusers keeps as parameters
    for name, reason in results["not_measured"].items():
        assert f"{name}: {reason}" in done.stdout


def test_the_decoders_of_unclip_and_diffusers_have_one_size(load):
    contender = load("contender")
    task = contender.Task(**contender.SIZES["quick"]["decoder"])
    with torch.device("meta"):
        ours = load("ours").unet_network(task)
        theirs = load("peers").diffusers_modules(task)
    # diffusers' projection contains the null embedding, which our stage has
    count = contender.count_parameters
    assert count(theirs) - task.embedding_dim == count(ours)


@pytest.mark.parametrize(
    ("size", "stage"), [("karlo", "upsampler_256"), ("paper", "upsampler_1024"), ("emoji", "prior")]
)
def test_peers_have_our_parameters_at_every_size(load, size, stage):
    contender = load("contender")
    task = contender.Task(**contender.SIZES[size][stage], compile=False, device="meta")
    with torch.device("meta"):
        if stage == "prior":
            ours = load("ours").prior_network(task)
            theirs = load("peers").diffusers_prior(task).modules
        else:
            ours, theirs = load("ours").unet_network(task), load("peers").diffusers_unet(task)
    count = contender.count_parameters
    statistics = 2 * task.embedding_dim if stage == "prior" else 0  # parameters only there
    assert count(theirs) - statistics == count(ours)


@pytest.mark.parametrize("size", ["emoji", "karlo", "paper"])
def test_the_clip_of_a_size_is_that_of_its_preset(load, size):
    contender = load("contender")
    task = contender.Task(**contender.SIZES[size]["clip"], compile=False, device="meta")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = plan._to_dict(compose("plan", ["stage=clip", f"scale={size}"]))
    with torch.device("meta"):
        ours, stage = load("ours").clip(task), bundle.build(config["model"])
    assert contender.count_parameters(ours.modules) == contender.count_parameters(stage)
    assert (task.batch, task.tokens) == (config["data"]["batch_size"], stage.model.context_length)


def test_our_prepared_evaluation_equals_the_prediction_of_training(load):
    contender = load("contender")
    how = {"device": "cpu", "bf16": False, "threads": 1, "compile": False}
    ours = load("ours").unet(contender.Task(**contender.SIZES["quick"]["decoder"], **how))
    ours.modules.eval()
    with torch.no_grad():
        for parameter in ours.modules.parameters():  # those of the last layer are zero
            parameter.add_(0.1)
        evaluated, predicted = ours.prepare()(), ours.predict()
    assert evaluated.shape[1] == 6 and predicted.abs().min() > 0
    torch.testing.assert_close(evaluated[:, :3], predicted)


def test_a_ratio_is_taken_round_by_round_and_counts_noises(load):
    one = {"parameters": 10, "GiB": 2.0, "planned GiB": None}
    about = {"unclip": one | {"noises": 4}, "diffusers": one | {"noises": 1}}
    seconds = {"unclip": [1.0, 2.0, 4.0], "diffusers": [1.0, 2.0, 4.0]}
    rows_of = load("speed").rows_of
    ours, theirs = rows_of(seconds, about, "train")
    assert (theirs["ratio"], theirs["ratio low"], theirs["ratio high"]) == (4, 4, 4)
    assert (ours["ms"], ours["GiB"]) == (2000, 2.0)
    _, step = rows_of(seconds, about, "step")
    assert step["ratio"] == 1 and step["GiB"] is None


def test_contenders_take_turns_and_each_begins_a_round(load):
    order = []
    runs = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    found = load("timing").interleave(runs, rounds=2, seconds=0)
    assert order == ["a", "b", "b", "a"]
    assert found == {"a": [1, 4], "b": [2, 3]}


def test_rounds_end_with_the_time_but_not_before_the_third(load):
    found = load("timing").interleave({"a": lambda: 1.0}, rounds=30, seconds=0)
    assert found == {"a": [1.0] * 3}


def test_a_table_is_markdown_with_aligned_columns(load):
    rows = [{"name": "a", "n": None}, {"name": "longer", "n": 1234.5}]
    assert load("results").markdown(rows).splitlines() == [
        "| name   | n       |",
        "| ------ | ------- |",
        "| a      | –       |",
        "| longer | 1,234.5 |",
    ]
