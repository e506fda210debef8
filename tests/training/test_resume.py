"""Whether a run goes on, from what, and that nobody could tell afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_shards import write_shards

from unclip.training import resuming
from unclip.training.resume import (
    ResumeError,
    check_same_run,
    find_checkpoint,
    claimed,
    choose_run_dir,
    is_intact,
)

HERE = Path(__file__).parent
RECORD = {"config": {"optimizer": {"lr": 0.1}, "seed": 0}, "data_set": "0123", "clip": None}


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch):
    for name in resuming._RANKS:
        monkeypatch.delenv(name, raising=False)


def write(path, step=3, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step, "run": json.dumps(RECORD), **more}, path)
    return path


def same(a, b, where=""):
    """Asserts that nested containers are equal to the bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            same(one, other, f"{where}.{number}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


# ------------------------------------------------------------------------------------- to the bit
@pytest.mark.slow
def test_a_run_of_many_deaths_is_the_run_of_none(tmp_path):
    """Killed ten times, at the worst moments, amid epochs, steps of two batches, with workers."""
    root = write_shards(tmp_path / "data", pictures=26)  # 7 batches of 4 an epoch
    path = os.pathsep.join(map(str, (HERE, HERE.parents[1] / "src", HERE.parent)))
    subprocess.run(
        [sys.executable, str(HERE / "kill_script.py"), str(tmp_path), str(root)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=280,
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    saved = [torch.load(run / "last.ckpt", weights_only=True) for run in (whole, cut)]
    assert saved[0]["global_step"] == 16
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
        same(saved[0][name], saved[1][name], name)
    logs = [(run / "logs" / "metrics.csv").read_text() for run in (whole, cut)]
    assert logs[0] == logs[1]
    assert logs[0].count("\n") == 1 + 16 + 4  # columns, steps, validations
    for run in (whole, cut):
        files = sorted(path.name for path in run.iterdir())
        assert files == [".lock", "last.ckpt", "logs", "previous.ckpt"]


# ------------------------------------------------------------------------------------- from where
def test_the_same_configuration_has_the_same_folder_until_its_run_is_finished(tmp_path):
    first = choose_run_dir(tmp_path, RECORD["config"])
    assert first == choose_run_dir(tmp_path, RECORD["config"])
    first.mkdir()
    assert first == choose_run_dir(tmp_path, RECORD["config"])
    (first / "objective.json").touch()
    assert choose_run_dir(tmp_path, RECORD["config"]).name == f"{first.name}-2"
    assert choose_run_dir(tmp_path, {"seed": 1}).name != first.name


def test_the_newest_readable_checkpoint_is_taken(tmp_path, capsys):
    assert find_checkpoint(tmp_path, "auto") is None
    previous, last = write(tmp_path / "previous.ckpt"), write(tmp_path / "last.ckpt")
    assert find_checkpoint(tmp_path, "auto") == find_checkpoint(tmp_path, str(last)) == last
    assert find_checkpoint(tmp_path, None) is None
    content = bytearray(last.read_bytes())
    for damage in (content[:-1], content[: len(content) // 2], b"", b"\0" * len(content)):
        last.write_bytes(damage)
        assert find_checkpoint(tmp_path, "auto") == previous
    assert str(last) in capsys.readouterr().out
    assert find_checkpoint(tmp_path, str(last)) == previous
    previous.write_bytes(b"")
    with pytest.raises(ResumeError, match=r"last\.ckpt.*previous\.ckpt.*resume=null"):
        find_checkpoint(tmp_path, "auto")
    last.unlink()
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt"):
        find_checkpoint(tmp_path, str(last))


def test_a_flipped_bit_is_seen(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"weights": torch.zeros(5000)}, path)
    assert is_intact(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not is_intact(path)


# ---------------------------------------------------------------------------------- of what run
def test_the_same_run_goes_on(tmp_path):
    check_same_run(write(tmp_path / "last.ckpt"), RECORD, max_steps=4)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (
            {**RECORD, "config": {"optimizer": {"lr": 0.2}, "seed": 0}},
            "optimizer.lr was 0.1, is 0.2",
        ),
        ({**RECORD, "config": {"optimizer": {"lr": 0.1}}}, "seed was 0, is null"),
        (RECORD | {"data_set": "4567"}, "the shards are not those"),
        (RECORD | {"clip": "89ab"}, 'clip was null, is "89ab"'),
    ],
)
def test_another_run_is_refused_unless_told_to(tmp_path, record, named):
    path = write(tmp_path / "last.ckpt")
    with pytest.raises(ResumeError, match=f"{named}.*resume_strict=false"):
        check_same_run(path, record, max_steps=4)
    check_same_run(path, record, max_steps=4, strict=False)


def test_a_finished_run_does_not_go_on(tmp_path):
    path = write(tmp_path / "last.ckpt", step=4)
    for anyway in (False, True):
        with pytest.raises(ResumeError, match="finished run, of 4 steps"):
            check_same_run(path, RECORD, max_steps=4, anyway=anyway)


def test_a_checkpoint_that_does_not_say_what_it_is_of(tmp_path):
    torch.save({"global_step": 3}, tmp_path / "last.ckpt")
    with pytest.raises(ResumeError, match="does not say"):
        check_same_run(tmp_path / "last.ckpt", RECORD, max_steps=4)


def test_code_in_a_checkpoint_is_refused_in_words(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = write(tmp_path / "last.ckpt", evil=Evil())
    for anyway in (False, True):
        with pytest.raises(ResumeError, match="could run code"):
            check_same_run(path, RECORD, max_steps=4, anyway=anyway)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------ alone in it
HOLD = """
import os, sys
from pathlib import Path
from unclip.training.resume import claimed
with lock_run_dir(Path(sys.argv[1])):
    if os.fork() == 0:  # a worker that outlives its parent
        sys.stdin.read()
        os._exit(0)
    print("held", flush=True)
    os.wait()
"""


def test_a_run_has_its_folder_for_itself_and_a_killed_one_gives_it_up_at_once(tmp_path):
    source = str(HERE.parents[1] / "src")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": source},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ResumeError, match=r"another process.*hydra\.run\.dir"), lock_run_dir(tmp_path):
        pass
    holder.kill()
    holder.wait()
    (tmp_path / ".last.ckpt.123.tmp").write_bytes(b"half of it")
    with lock_run_dir(tmp_path):
        assert not list(tmp_path.glob(".last*"))
    holder.stdin.close()
    holder.stdout.close()


def test_other_ranks_claim_nothing(tmp_path, monkeypatch):
    with lock_run_dir(tmp_path):
        monkeypatch.setenv("LOCAL_RANK", "1")
        with lock_run_dir(tmp_path, restart=True):
            pass


def test_anew_means_without_the_checkpoints_of_before(tmp_path):
    write(tmp_path / "last.ckpt")
    write(tmp_path / "previous.ckpt")
    with lock_run_dir(tmp_path, restart=True):
        assert find_checkpoint(tmp_path, "auto") is None
