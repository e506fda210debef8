"""Resuming a run: its folder, its checkpoint, and a result equal to that of an unbroken run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from script import logged, run_helper
from tiny_shards import write_shards

from unclip import launcher
from unclip.training.resume import (
    Decay,
    ResumeError,
    check_same_run,
    choose_run_dir,
    find_checkpoint,
    is_intact,
    keep_stable,
    lock_run_dir,
    resume_decay,
)

SOURCE = Path(__file__).parents[2] / "src"
RECORD = {"config": {"optimizer": {"lr": 0.1}, "seed": 0}, "data_set": "0123", "clip": None}


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch):
    for name in launcher._RANKS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def last(tmp_path):
    return write(tmp_path / "last.ckpt")


def write(path, step=3, decay=None, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    record = RECORD | ({"decay": decay._asdict()} if decay else {})
    torch.save({"global_step": step, "run": json.dumps(record), **more}, path)
    return path


@pytest.mark.slow
def test_a_run_that_was_killed_many_times_equals_an_unbroken_run(tmp_path):
    """Killed ten times at the worst moments: within epochs, and within steps of two batches."""
    root = write_shards(tmp_path / "data", images=26)  # 7 batches of 4 per epoch
    run_helper("training/kill_script.py", tmp_path, root)
    runs = (tmp_path / "whole", tmp_path / "cut")
    whole, cut = (torch.load(run / "last.ckpt", weights_only=True) for run in runs)
    assert whole["global_step"] == 16
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
        torch.testing.assert_close(cut[name], whole[name], rtol=0, atol=0)
    assert logged(runs[0]) == logged(runs[1])
    assert len(logged(runs[0])) == 16 + 4  # steps and validations
    for run in runs:
        files = sorted(path.name for path in run.iterdir())
        assert files == [".lock", "last.ckpt", "logs", "previous.ckpt"]


def test_a_configuration_keeps_its_folder_until_its_run_has_finished(tmp_path):
    first = choose_run_dir(tmp_path, RECORD["config"])
    first.mkdir()
    assert first == choose_run_dir(tmp_path, RECORD["config"])
    (first / "objective.json").touch()
    assert choose_run_dir(tmp_path, RECORD["config"]).name == f"{first.name}-2"
    assert choose_run_dir(tmp_path, {"seed": 1}).name != first.name


def test_the_newest_intact_checkpoint_is_found(tmp_path, capsys):
    assert find_checkpoint(tmp_path, "auto") is None
    previous, last = write(tmp_path / "previous.ckpt"), write(tmp_path / "last.ckpt")
    assert find_checkpoint(tmp_path, "auto") == find_checkpoint(tmp_path, str(last)) == last
    assert find_checkpoint(tmp_path, None) is None
    content = last.read_bytes()
    for damage in (content[:-1], content[: len(content) // 2], b"", b"\0" * len(content)):
        last.write_bytes(damage)
        assert find_checkpoint(tmp_path, "auto") == previous
    assert str(last) in capsys.readouterr().out
    assert find_checkpoint(tmp_path, str(last)) == previous
    previous.write_bytes(b"")
    with pytest.raises(ResumeError, match=r"last\.ckpt.*previous\.ckpt.*resume=null"):
        find_checkpoint(tmp_path, "auto")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_flipped_bit_is_detected_by_rank_0_and_outside_of_tensors_by_all(
    tmp_path, monkeypatch, rank
):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    path = tmp_path / "last.ckpt"
    torch.save({"weights": torch.zeros(5000)}, path)
    whole = path.read_bytes()
    assert is_intact(path)
    for part, intact in ((bytes(5000), rank > 0), (b"weights", False)):
        at = whole.index(part)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert is_intact(path) == intact


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"config": {"optimizer": {"lr": 0.2}, "seed": 0}}, "optimizer.lr was 0.1, is 0.2"),
        ({"config": {"optimizer": {"lr": 0.1}}}, "seed was 0, is null"),
        ({"data_set": "4567"}, "the shards are not those"),
        ({"clip": "89ab"}, 'clip was null, is "89ab"'),
    ],
)
def test_only_the_same_run_resumes_unless_strict_is_false(last, changed, named):
    check_same_run(last, RECORD, max_steps=4)
    with pytest.raises(ResumeError, match=f"{named}.*resume_strict=false"):
        check_same_run(last, RECORD | changed, max_steps=4)
    check_same_run(last, RECORD | changed, max_steps=4, strict=False)


def test_a_checkpoint_that_does_not_describe_its_run_is_refused(last):
    torch.save({"global_step": 3}, last)
    with pytest.raises(ResumeError, match="does not describe"):
        check_same_run(last, RECORD, max_steps=4)


@pytest.mark.parametrize("strict", [False, True])
def test_a_finished_run_does_not_resume(last, strict):
    check_same_run(last, RECORD, max_steps=3)  # killed before it was marked as finished
    (last.parent / "objective.json").touch()
    with pytest.raises(ResumeError, match="finished run of 3 steps"):
        check_same_run(last, RECORD, max_steps=3, strict=strict)


HOLD = """
import os, sys
from pathlib import Path
from unclip.training.resume import lock_run_dir
with lock_run_dir(Path(sys.argv[1])):
    if os.fork() == 0:  # a worker that outlives its parent
        sys.stdin.read()
        os._exit(0)
    print("held", flush=True)
    os.wait()
"""


def test_a_run_locks_its_folder_and_a_killed_run_frees_it_at_once(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        refused = pytest.raises(ResumeError, match=r"another process.*hydra\.run\.dir")
        with refused, lock_run_dir(tmp_path):
            pass
        holder.kill()
        holder.wait()
        (tmp_path / ".last.ckpt.123.tmp").write_bytes(b"half of it")
        with lock_run_dir(tmp_path):
            assert not list(tmp_path.glob(".last*"))


def test_other_ranks_lock_nothing(tmp_path, monkeypatch):
    with lock_run_dir(tmp_path):
        monkeypatch.setenv("LOCAL_RANK", "1")
        with lock_run_dir(tmp_path, restart=True):
            pass


def test_a_restart_deletes_the_earlier_checkpoints_and_the_log(last):
    write(last.with_name("previous.ckpt"))
    log = last.parent / "logs" / "metrics.csv"
    log.parent.mkdir()
    log.touch()
    with lock_run_dir(last.parent, restart=True):
        assert find_checkpoint(last.parent, "auto") is None
        assert not log.exists()


@pytest.mark.parametrize(
    ("before", "steps", "expected"),
    [
        (None, 0, Decay(0)),  # a new run
        (None, 10, Decay(10)),
        (Decay(0), 0, Decay(0)),
        (Decay(0), 10, Decay(10, start=20)),
        (Decay(10, start=20), 10, Decay(10, start=20)),
        (Decay(10), 10, Decay(10)),
    ],
)
def test_a_decay_starts_at_a_checkpoint_or_continues(tmp_path, before, steps, expected):
    checkpoint = before and write(tmp_path / "last.ckpt", 20, before)
    assert resume_decay(checkpoint, steps, folder=tmp_path) == (checkpoint, expected)
    assert expected.end == (30 if expected.start else None)  # None: as planned from its start


def test_the_same_command_continues_a_decay_from_any_checkpoint(tmp_path):
    stable = write(tmp_path / "stable.ckpt", 20)
    last = write(tmp_path / "last.ckpt", 25, Decay(10, start=20))
    begun = (stable, Decay(10, start=20))
    assert resume_decay(stable, 10, folder=tmp_path) == (last, Decay(10, start=20))
    assert resume_decay(stable, 12, folder=tmp_path) == (stable, Decay(12, start=20))
    assert resume_decay(stable, 0, folder=tmp_path) == (stable, Decay(0))
    write(last, 35, Decay(10, start=30))  # a decay from elsewhere
    assert resume_decay(stable, 10, folder=tmp_path) == begun
    elsewhere = tmp_path / "elsewhere"
    write(last, 25, Decay(10, start=20))
    assert resume_decay(stable, 10, folder=elsewhere) == begun
    own = write(elsewhere / "last.ckpt", 27, Decay(10, start=20))
    assert resume_decay(stable, 10, folder=elsewhere) == (own, Decay(10, start=20))
    last.write_bytes(last.read_bytes()[:-1])
    assert resume_decay(stable, 10, folder=tmp_path) == begun


@pytest.mark.parametrize("steps", [0, 12])
def test_a_decay_of_another_length_is_refused_unless_strict_is_false(tmp_path, steps):
    last = write(tmp_path / "last.ckpt", 25, Decay(10, start=20))
    with pytest.raises(ResumeError, match=r"decay_steps=10 to continue it, or .*strict=false"):
        resume_decay(last, steps, folder=tmp_path)
    stable = write(tmp_path / "stable.ckpt", 20)
    with pytest.raises(ResumeError, match=f"resume={stable} for the run before the decay"):
        resume_decay(last, steps, folder=tmp_path)
    expected = Decay(steps, start=25 if steps else None)
    assert resume_decay(last, steps, folder=tmp_path, strict=False) == (last, expected)


def test_a_decay_may_start_although_resuming_is_strict(last):
    record = RECORD | {"decay": Decay(10, start=3)._asdict()}
    check_same_run(last, record, max_steps=30)
    with pytest.raises(ResumeError, match="seed was 0, is 1"):
        check_same_run(last, record | {"config": {"seed": 1}}, max_steps=30)


def test_the_checkpoint_before_the_decay_is_kept(tmp_path):
    last, decay = write(tmp_path / "last.ckpt", 20), Decay(10, start=20)
    before = last.read_bytes()
    keep_stable(last, decay, tmp_path)
    last.unlink()
    write(last, 25, decay)
    keep_stable(last, decay, tmp_path)  # the decay was killed and continues
    keep_stable(tmp_path / "stable.ckpt", decay, tmp_path)
    assert (tmp_path / "stable.ckpt").read_bytes() == before
