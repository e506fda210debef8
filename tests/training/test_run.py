import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from tiny_shards import write_shards

from unclip.data.embeddings import embeddings_path, read_embeddings
from unclip.training import preparation
from unclip.training.embeddings import check_sizes, embed_shards


def test_what_is_there_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", pytest.fail)
    (tmp_path / "clip.safetensors").touch()
    preparation.ensure_upstream(["clip"], tmp_path, [], train=True)
    preparation.ensure_upstream([], tmp_path, [], train=False)
    (tmp_path / "done").touch()
    preparation.ensure_data(pytest.fail, tmp_path / "done")
    preparation.ensure_data(None, None)


def test_a_missing_stage_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["src/train.py"])
    words = ["stage=decoder", "scale=quick", "network.channels=8", "data.root=my data"]
    with pytest.raises(FileNotFoundError) as error:
        preparation.ensure_upstream(["clip"], tmp_path, words, train=False)
    assert str(tmp_path / "clip.safetensors") in str(error.value)
    command = "`python src/train.py stage=clip scale=quick 'data.root=my data'`"
    assert command in str(error.value)


def test_what_embeds_names_what_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["src/embed.py"])
    with pytest.raises(FileNotFoundError, match=r"`python src/train\.py stage=clip`"):
        preparation.ensure_upstream(["clip"], tmp_path, [], train=False)


@pytest.mark.parametrize(("name", "text"), [("TORCHELASTIC_RUN_ID", "1"), ("SLURM_NTASKS", "2")])
def test_ranks_do_not_train_what_is_missing(tmp_path, monkeypatch, name, text):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a run was started"))
    monkeypatch.setattr(sys, "argv", ["src/train.py"])
    monkeypatch.setenv(name, text)
    with pytest.raises(FileNotFoundError, match=r"srun: .* first with `python .*stage=clip`"):
        preparation.ensure_upstream(["clip"], tmp_path, [], train=True)


def test_an_upstream_run_is_a_job_of_its_own(tmp_path, monkeypatch):
    calls = []

    def run(words, env, check):
        calls.append((words, env))
        (tmp_path / "clip.safetensors").touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["src/train.py", "stage=prior"])
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    words = ["stage=prior", "bundle=mine", "trainer=ddp", "trainer.max_steps=3"]
    preparation.ensure_upstream(["clip"], tmp_path, words, train=True)
    ((command, environment),) = calls
    assert command[1:] == ["src/train.py", "stage=clip", "bundle=mine", "trainer=ddp"]
    assert not [name for name in environment if name.endswith(("RANK", "PORT"))]
    assert not {"WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID"} & environment.keys()


def test_a_failed_upstream_run_ends_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=3))
    with pytest.raises(ChildProcessError, match="code 3"):
        preparation.ensure_upstream(["clip"], tmp_path, [], train=True)


def test_one_at_a_time(tmp_path):
    inside = []

    def work():
        with preparation.one_at_a_time(tmp_path / "new"):
            inside.append(1)
            time.sleep(0.05)
            assert len(inside) == 1
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == []


class MeanColor:
    """An embedder whose embedding is the mean color."""

    fingerprint, image_size = "0123456789abcdef", 32

    def __init__(self):
        self.images = 0

    def image(self, image):
        self.images += len(image)
        return image.float().mean((2, 3)) / 255


def test_a_clip_of_another_size_is_named():
    clip = SimpleNamespace(embedding_dim=8, text_width=16, context_length=77, fingerprint="0123")
    check_sizes(clip, {"embedding_dim": 8, "text_width": 16, "context_length": 77})
    with pytest.raises(ValueError, match=r"clip\.text_width=16"):
        check_sizes(clip, {"embedding_dim": 8, "text_width": 32, "context_length": 77})


def test_embeddings_are_computed_once_and_stand_beside_their_shards(tmp_path):
    root = write_shards(tmp_path / "data", pictures=12)
    folders = [root / "train" / "64", root / "val" / "64"]
    embedder = MeanColor()
    assert embed_shards(embedder, folders, batch_size=4) == 4
    assert embedder.images == 24
    assert embed_shards(embedder, folders) == 0
    rows, embeddings = read_embeddings(folders[0] / "00001.tar", embedder.fingerprint)
    assert list(rows) == [f"{index:08d}" for index in range(1, 12, 2)]
    assert embeddings[rows["00000005"]].argmax() == 1  # green
    embeddings_path(folders[1] / "00000.tar", embedder.fingerprint).unlink()
    assert embed_shards(embedder, folders) == 1
