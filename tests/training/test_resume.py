"""Resuming a run: its folder, its checkpoint, and a result equal to that of an unbroken run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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

HERE = Path(__file__).parent
RECORD = {"config": {"optimizer": {"lr": 0.1}, "seed": 0}, "data_set": "0123", "clip": None}


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch):
    for name in launcher._RANKS:
        monkeypatch.delenv(name, raising=False)


def write(path, step=3, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step, "run": json.dumps(RECORD), **more}, path)
    return path


def assert_equal(a, b, where=""):
    """Compares nested containers bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_equal(one, other, f"{where}.{number}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.slow
def test_a_run_that_was_killed_many_times_equals_an_unbroken_run(tmp_path):
    """Killed ten times at the worst moments: within epochs, and within steps of two batches."""
    root = write_shards(tmp_path / "data", images=26)  # 7 batches of 4 per epoch
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
        assert_equal(saved[0][name], saved[1][name], name)
    logs = [(run / "logs" / "metrics.csv").read_text() for run in (whole, cut)]
    assert logs[0] == logs[1]
    assert logs[0].count("\n") == 1 + 16 + 4  # columns, steps, validations
    for run in (whole, cut):
        files = sorted(path.name for path in run.iterdir())
        assert files == [".lock", "last.ckpt", "logs", "previous.ckpt"]


def test_a_configuration_keeps_its_folder_until_its_run_has_finished(tmp_path):
    first = choose_run_dir(tmp_path, RECORD["config"])
    assert first == choose_run_dir(tmp_path, RECORD["config"])
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


def test_a_flipped_bit_is_detected(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"weights": torch.zeros(5000)}, path)
    assert is_intact(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not is_intact(path)


def test_other_ranks_verify_all_but_the_tensors(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    path = tmp_path / "last.ckpt"
    torch.save({"weights": torch.zeros(5000)}, path)
    whole = path.read_bytes()
    tensor, words = (whole.index(one) for one in (bytes(5000), b"weights"))
    for at, intact in ((tensor, True), (words, False)):
        content = bytearray(whole)
        content[at] ^= 1
        path.write_bytes(content)
        assert is_intact(path) == intact
    path.write_bytes(whole[:-1])
    assert not is_intact(path)


def test_the_same_run_resumes(tmp_path):
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
def test_another_run_is_refused_unless_strict_is_false(tmp_path, record, named):
    path = write(tmp_path / "last.ckpt")
    with pytest.raises(ResumeError, match=f"{named}.*resume_strict=false"):
        check_same_run(path, record, max_steps=4)
    check_same_run(path, record, max_steps=4, strict=False)


def test_a_finished_run_does_not_resume(tmp_path):
    path = write(tmp_path / "last.ckpt", step=4)
    check_same_run(path, RECORD, max_steps=4)  # killed before it was marked as finished
    (tmp_path / "objective.json").touch()
    for strict in (False, True):
        with pytest.raises(ResumeError, match="finished run of 4 steps"):
            check_same_run(path, RECORD, max_steps=4, strict=strict)


def test_a_checkpoint_that_does_not_describe_its_run_is_refused(tmp_path):
    torch.save({"global_step": 3}, tmp_path / "last.ckpt")
    with pytest.raises(ResumeError, match="does not describe"):
        check_same_run(tmp_path / "last.ckpt", RECORD, max_steps=4)


def test_code_in_a_checkpoint_is_refused_with_a_reason(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = write(tmp_path / "last.ckpt", evil=Evil())
    for strict in (False, True):
        with pytest.raises(ResumeError, match="could run code"):
            check_same_run(path, RECORD, max_steps=4, strict=strict)
    assert not (tmp_path / "ran").exists()


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
    source = str(HERE.parents[1] / "src")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": source},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    with (
        pytest.raises(ResumeError, match=r"another process.*hydra\.run\.dir"),
        lock_run_dir(tmp_path),
    ):
        pass
    holder.kill()
    holder.wait()
    (tmp_path / ".last.ckpt.123.tmp").write_bytes(b"half of it")
    with lock_run_dir(tmp_path):
        assert not list(tmp_path.glob(".last*"))
    holder.stdin.close()
    holder.stdout.close()


def test_other_ranks_lock_nothing(tmp_path, monkeypatch):
    with lock_run_dir(tmp_path):
        monkeypatch.setenv("LOCAL_RANK", "1")
        with lock_run_dir(tmp_path, restart=True):
            pass


def test_a_restart_deletes_the_earlier_checkpoints(tmp_path):
    write(tmp_path / "last.ckpt")
    write(tmp_path / "previous.ckpt")
    with lock_run_dir(tmp_path, restart=True):
        assert find_checkpoint(tmp_path, "auto") is None


def write_decaying(path, step, decay=None):
    run = {"config": {"seed": 0}, "decay": (decay or Decay(0))._asdict()}
    torch.save({"global_step": step, "run": json.dumps(run)}, path)
    return path


def test_without_a_decay_a_run_ends_as_configured(tmp_path):
    for checkpoint in (None, write_decaying(tmp_path / "last.ckpt", 20)):
        resumed, decay = resume_decay(checkpoint, 0, folder=tmp_path)
        assert (resumed, decay) == (checkpoint, Decay(0))
        assert decay.end is None


def test_a_new_run_decays_at_its_end(tmp_path):
    resumed, decay = resume_decay(None, 10, folder=tmp_path)
    assert resumed is None and decay.steps == 10 and decay.end is None


def test_a_decay_starts_at_the_checkpoint_and_ends_the_run(tmp_path):
    last = write_decaying(tmp_path / "last.ckpt", 20)
    assert resume_decay(last, 10, folder=tmp_path) == (last, Decay(10, start=20))
    assert Decay(10, start=20).end == 30


@pytest.mark.parametrize("decay", [Decay(10, start=20), Decay(10)])
def test_a_decay_that_has_started_continues(tmp_path, decay):
    last = write_decaying(tmp_path / "last.ckpt", 25, decay)
    assert resume_decay(last, 10, folder=tmp_path) == (last, decay)


def test_the_same_command_continues_a_decay_from_any_checkpoint(tmp_path):
    stable = write_decaying(tmp_path / "stable.ckpt", 20)
    last = write_decaying(tmp_path / "last.ckpt", 25, Decay(10, start=20))
    assert resume_decay(stable, 10, folder=tmp_path) == (last, Decay(10, start=20))
    assert resume_decay(stable, 12, folder=tmp_path) == (stable, Decay(12, start=20))
    assert resume_decay(stable, 0, folder=tmp_path) == (stable, Decay(0))
    write_decaying(last, 35, Decay(10, start=30))  # a decay from elsewhere
    assert resume_decay(stable, 10, folder=tmp_path) == (stable, Decay(10, start=20))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_decaying(last, 25, Decay(10, start=20))
    assert resume_decay(stable, 10, folder=elsewhere) == (stable, Decay(10, start=20))
    own = write_decaying(elsewhere / "last.ckpt", 27, Decay(10, start=20))
    assert resume_decay(stable, 10, folder=elsewhere) == (own, Decay(10, start=20))
    last.write_bytes(last.read_bytes()[:-1])
    assert resume_decay(stable, 10, folder=tmp_path) == (stable, Decay(10, start=20))


@pytest.mark.parametrize("steps", [0, 12])
def test_a_decay_of_another_length_is_refused_unless_strict_is_false(tmp_path, steps):
    last = write_decaying(tmp_path / "last.ckpt", 25, Decay(10, start=20))
    with pytest.raises(ResumeError, match=r"decay_steps=10 to continue it, or .*strict=false"):
        resume_decay(last, steps, folder=tmp_path)
    stable = write_decaying(tmp_path / "stable.ckpt", 20)
    with pytest.raises(ResumeError, match=f"resume={stable} for the run before the decay"):
        resume_decay(last, steps, folder=tmp_path)
    expected = Decay(steps, start=25 if steps else None)
    assert resume_decay(last, steps, folder=tmp_path, strict=False) == (last, expected)


def test_a_decay_may_start_although_resuming_is_strict(tmp_path):
    last = write_decaying(tmp_path / "last.ckpt", 20)
    record = {"config": {"seed": 0}, "decay": Decay(10, start=20)._asdict()}
    check_same_run(last, record, max_steps=30)
    with pytest.raises(ResumeError, match="seed was 0, is 1"):
        check_same_run(last, record | {"config": {"seed": 1}}, max_steps=30)


def test_the_checkpoint_before_the_decay_is_kept(tmp_path):
    last, decay = write_decaying(tmp_path / "last.ckpt", 20), Decay(10, start=20)
    before = last.read_bytes()
    keep_stable(last, decay, tmp_path)
    last.unlink()
    write_decaying(last, 25, decay)
    keep_stable(last, decay, tmp_path)  # the decay was killed and continues
    keep_stable(tmp_path / "stable.ckpt", decay, tmp_path)
    assert (tmp_path / "stable.ckpt").read_bytes() == before
