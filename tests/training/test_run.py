"""What a run needs before it starts: data, upstream stages, disk space and initial weights."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny_bundle
import torch

from unclip import bundle
from unclip.training import run
from unclip.training.modules import PriorModule


@pytest.fixture(autouse=True)
def train_py(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["src/train.py"])


def test_existing_stages_and_data_are_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", pytest.fail)
    (tmp_path / "clip.safetensors").touch()
    run.ensure_upstream(["clip"], tmp_path, [], train=True)
    run.ensure(tmp_path / "clip.safetensors", pytest.fail)


@pytest.mark.parametrize("script", ["train", "embed"])
def test_a_missing_stage_is_named_with_its_command(tmp_path, monkeypatch, script):
    monkeypatch.setattr(sys, "argv", [f"src/{script}.py"])
    words = ["stage=decoder", "scale=quick", "++network.channels=8", "data.root=my data"]
    command = r"`python src/train\.py stage=clip scale=quick 'data\.root=my data'`"
    with pytest.raises(FileNotFoundError, match=rf"clip\.safetensors is missing.*{command}"):
        run.ensure_upstream(["clip"], tmp_path, words, train=False)


@pytest.mark.parametrize(("name", "text"), [("TORCHELASTIC_RUN_ID", "1"), ("SLURM_NTASKS", "2")])
def test_ranks_do_not_train_missing_stages(tmp_path, monkeypatch, name, text):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a run was started"))
    monkeypatch.setenv(name, text)
    command = r"under (srun|torchrun): .* first with `python .*stage=clip`"
    with pytest.raises(FileNotFoundError, match=command):
        run.ensure_upstream(["clip"], tmp_path, [], train=True)


@pytest.mark.parametrize("code", [0, 3])
def test_an_upstream_run_is_a_separate_job_whose_failure_ends_this_one(tmp_path, monkeypatch, code):
    calls = []

    def fake_run(words, env, check):
        calls.append((words, env))
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", fake_run)
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    # without val_shards the CLIP would train on the samples that the prior holds out
    inherited = ["bundle=mine", "trainer=ddp", "data.val_shards=2"]
    words = ["stage=prior", *inherited, "trainer.max_steps=3", "data.batch_size=4"]
    failure = pytest.raises(ChildProcessError, match="code 3") if code else nullcontext()
    with failure:
        run.ensure_upstream(["clip"], tmp_path, words, train=True)
    ((command, environment),) = calls
    assert command[1:] == ["src/train.py", "stage=clip", *inherited]
    assert not [name for name in environment if name.endswith(("RANK", "PORT"))]
    assert not {"WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID"} & environment.keys()


def test_only_one_process_at_a_time_holds_the_lock(tmp_path):
    inside = []

    def work():
        with run.one_at_a_time(tmp_path / "new"):
            inside.append(1)
            time.sleep(0.05)
            assert len(inside) == 1
            inside.pop()

    with ThreadPoolExecutor(3) as threads:
        for future in [threads.submit(work) for _ in range(3)]:
            future.result()


@pytest.mark.parametrize(("replaced", "needed"), [((), 36), ((16, 15), 5)])
def test_the_disk_must_hold_two_checkpoints_and_the_stage(tmp_path, monkeypatch, replaced, needed):
    """In megabytes; a resumed run replaces its checkpoints."""
    stage = torch.nn.Linear(999, 1000, device="meta")
    for name, size in zip(("last.ckpt", "previous.ckpt"), replaced, strict=False):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size * 10**6)
    usage = SimpleNamespace(free=needed * 10**6)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: usage)
    run.check_disk(stage, [tmp_path / "not" / "there" / "yet"], tmp_path)
    usage.free -= 1
    with pytest.raises(ValueError, match=r"0\.0 GiB are free"):
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
    copied = tmp_path / "mine" / "clip.safetensors"
    assert copied.read_bytes() == (folder / copied.name).read_bytes()
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


@pytest.mark.parametrize("loaded", [False, True])
def test_initial_weights_bring_their_statistics(folder, monkeypatch, loaded):
    embedder = bundle.load_embedder(folder / "clip.safetensors")
    stage, fits = bundle.build({**tiny_bundle.recipe("prior"), "learn_null_text": False}), []
    parts = {"recipe": {}, "optimizer": None, "schedule": None, "embedder": embedder}
    module = PriorModule(stage, statistics_loaded=loaded, **parts)
    monkeypatch.setattr(stage, "fit_statistics", fits.append)
    monkeypatch.setattr(module, "training_batches", lambda: "batches")
    trainer = SimpleNamespace(ckpt_path=None, world_size=1, is_global_zero=True)
    monkeypatch.setattr(PriorModule, "trainer", trainer)
    module.on_fit_start()
    assert fits == ([] if loaded else ["batches"])
    assert not stage.null_text.states.requires_grad
    expected = (not loaded) * embedder.text([""]).text_states
    torch.testing.assert_close(stage.null_text.states, expected[:, :2])
