"""What a run needs before it starts: data, upstream stages, disk space and initial weights."""

import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import tiny_bundle
import torch

from unclip import bundle
from unclip.training import run


def test_existing_stages_and_data_are_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", pytest.fail)
    (tmp_path / "clip.safetensors").touch()
    run.ensure_upstream(["clip"], tmp_path, [], train=True)
    run.ensure_upstream([], tmp_path, [], train=False)
    (tmp_path / "done").touch()
    run.ensure_data(pytest.fail, tmp_path / "done")


def test_a_missing_stage_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["src/train.py"])
    words = ["stage=decoder", "scale=quick", "++network.channels=8", "data.root=my data"]
    with pytest.raises(FileNotFoundError) as error:
        run.ensure_upstream(["clip"], tmp_path, words, train=False)
    assert str(tmp_path / "clip.safetensors") in str(error.value)
    command = "`python src/train.py stage=clip scale=quick 'data.root=my data'`"
    assert command in str(error.value)


def test_embed_py_names_the_command_of_train_py(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["src/embed.py"])
    with pytest.raises(FileNotFoundError, match=r"`python src/train\.py stage=clip`"):
        run.ensure_upstream(["clip"], tmp_path, [], train=False)


@pytest.mark.parametrize(("name", "text"), [("TORCHELASTIC_RUN_ID", "1"), ("SLURM_NTASKS", "2")])
def test_ranks_do_not_train_missing_stages(tmp_path, monkeypatch, name, text):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a run was started"))
    monkeypatch.setattr(sys, "argv", ["src/train.py"])
    monkeypatch.setenv(name, text)
    with pytest.raises(
        FileNotFoundError, match=r"under (srun|torchrun): .* first with `python .*stage=clip`"
    ):
        run.ensure_upstream(["clip"], tmp_path, [], train=True)


def test_an_upstream_run_is_a_separate_job(tmp_path, monkeypatch):
    calls = []

    def fake_run(words, env, check):
        calls.append((words, env))
        (tmp_path / "clip.safetensors").touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", fake_run)
    monkeypatch.setattr(sys, "argv", ["src/train.py", "stage=prior"])
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    words = ["stage=prior", "bundle=mine", "trainer=ddp", "trainer.max_steps=3"]
    words.append("data.val_shards=2")  # otherwise the CLIP would train on what the prior holds out
    run.ensure_upstream(["clip"], tmp_path, words, train=True)
    ((command, environment),) = calls
    inherited = ["bundle=mine", "trainer=ddp", "data.val_shards=2"]
    assert command[1:] == ["src/train.py", "stage=clip", *inherited]
    assert not [name for name in environment if name.endswith(("RANK", "PORT"))]
    assert not {"WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID"} & environment.keys()


def test_a_failed_upstream_run_ends_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=3))
    with pytest.raises(ChildProcessError, match="code 3"):
        run.ensure_upstream(["clip"], tmp_path, [], train=True)


def test_only_one_process_at_a_time_holds_the_lock(tmp_path):
    inside = []

    def work():
        with run.one_at_a_time(tmp_path / "new"):
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


def free_space(monkeypatch, size):
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: SimpleNamespace(free=size))


def test_the_disk_must_hold_two_checkpoints_and_the_stage(tmp_path, monkeypatch):
    stage = torch.nn.Linear(999, 1000, device="meta")
    assert run.checkpoint_bytes(stage) == 16e6
    free_space(monkeypatch, 36_000_000)
    run.check_disk(stage, [tmp_path / "not" / "there" / "yet"], tmp_path)
    free_space(monkeypatch, 35_999_999)
    with pytest.raises(ValueError, match=r"0\.0 GiB are free"):
        run.check_disk(stage, [tmp_path], tmp_path)


def test_a_resumed_run_replaces_its_checkpoints(tmp_path, monkeypatch):
    stage = torch.nn.Linear(999, 1000, device="meta")
    for name, size in (("last.ckpt", 16_000_000), ("previous.ckpt", 15_000_000)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)
    free_space(monkeypatch, 5_000_000)
    run.check_disk(stage, [tmp_path], tmp_path)
    free_space(monkeypatch, 4_999_999)
    with pytest.raises(ValueError, match="are free"):
        run.check_disk(stage, [tmp_path], tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bundle.write(tmp_path_factory.mktemp("models") / "tiny", ("clip", "prior"))


def test_init_is_a_bundle_or_a_file(folder):
    path = folder / "prior.safetensors"
    assert run.resolve_init(folder, "prior") == run.resolve_init(path, "prior") == path
    with pytest.raises(FileNotFoundError, match=r"init=.*decoder\.safetensors"):
        run.resolve_init(folder, "decoder")


def test_the_clip_of_the_initial_weights_is_copied_unless_the_bundle_has_one(folder, tmp_path):
    run.copy_upstream(["clip", "absent"], folder, tmp_path / "mine")
    names = ("clip.safetensors",)
    copied = tmp_path / "mine" / names[0]
    assert copied.read_bytes() == (folder / names[0]).read_bytes()
    copied.write_bytes(b"own")
    run.copy_upstream(["clip"], folder, tmp_path / "mine")
    assert copied.read_bytes() == b"own"  # an existing file is kept


def test_sizes_of_initial_weights_are_compared_on_the_meta_device(folder):
    recipe = tiny_bundle.recipe("prior")
    with torch.device("meta"):
        bundle.check_init(bundle.build(recipe), folder / "prior.safetensors")
        recipe["network"]["layers"] = 2
        with pytest.raises(ValueError, match=r"lacks network\.blocks\.1"):
            bundle.check_init(bundle.build(recipe), folder / "prior.safetensors")


class Trainer:
    """The attributes that the start of a fit uses."""

    ckpt_path, world_size, is_global_zero = None, 1, True


def test_initial_weights_bring_their_statistics(folder, monkeypatch):
    from unclip.training.modules import PriorModule

    embedder = bundle.load_embedder(folder / "clip.safetensors")
    empty = embedder.text([""])
    for loaded in (False, True):
        recipe = {**tiny_bundle.recipe("prior"), "learn_null_text": False}
        module = PriorModule(
            bundle.build(recipe),
            recipe=recipe,
            optimizer=None,
            schedule=None,
            embedder=embedder,
            statistics_loaded=loaded,
        )
        fits = []
        monkeypatch.setattr(module.stage, "fit_statistics", fits.append)
        monkeypatch.setattr(module, "training_batches", lambda: "batches")
        monkeypatch.setattr(type(module), "trainer", Trainer())
        module.on_fit_start()
        assert fits == ([] if loaded else ["batches"])
        null = module.stage.null_text
        assert not null.states.requires_grad
        expected = 0 * empty.text_states if loaded else empty.text_states
        torch.testing.assert_close(null.states, expected[:, :2])
