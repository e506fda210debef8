"""A decay starts once, from the checkpoint that is named, and then continues."""

import json

import pytest
import torch

from unclip.training.decay import Decay, keep_stable, resume_decay
from unclip.training.resume import ResumeError, check_same_run

SETTINGS = {"max_steps": 1000, "max_steps_multiplier": 0.5, "devices": 1}


def write(path, step, decay=None):
    run = {"config": {"seed": 0}, "decay": (decay or Decay(0))._asdict()}
    torch.save({"global_step": step, "run": json.dumps(run)}, path)
    return path


def test_without_a_decay_the_trainer_is_as_configured(tmp_path):
    for checkpoint in (None, write(tmp_path / "last.ckpt", 20)):
        resumed, decay = resume_decay(checkpoint, 0, folder=tmp_path)
        assert (resumed, decay) == (checkpoint, Decay(0))
        assert decay.trainer_settings(SETTINGS) == SETTINGS


def test_a_new_run_decays_at_its_end(tmp_path):
    resumed, decay = resume_decay(None, 10, folder=tmp_path)
    assert resumed is None and decay.trainer_settings(SETTINGS) == SETTINGS


def test_a_decay_starts_at_the_checkpoint_and_ends_the_run(tmp_path):
    last = write(tmp_path / "last.ckpt", 20)
    assert resume_decay(last, 10, folder=tmp_path) == (last, Decay(10, start=20))
    settings = Decay(10, start=20).trainer_settings(SETTINGS)
    assert settings == {"max_steps": 30, "max_steps_multiplier": 1.0, "devices": 1}


@pytest.mark.parametrize("decay", [Decay(10, start=20), Decay(10)])
def test_a_decay_that_has_started_continues(tmp_path, decay):
    last = write(tmp_path / "last.ckpt", 25, decay)
    assert resume_decay(last, 10, folder=tmp_path) == (last, decay)


def test_the_same_command_continues_a_decay_from_any_checkpoint(tmp_path):
    stable = write(tmp_path / "stable.ckpt", 20)
    last = write(tmp_path / "last.ckpt", 25, Decay(10, start=20))
    assert resume_decay(stable, 10, folder=tmp_path) == (last, Decay(10, start=20))
    assert resume_decay(stable, 12, folder=tmp_path) == (stable, Decay(12, start=20))
    assert resume_decay(stable, 0, folder=tmp_path) == (stable, Decay(0))
    write(last, 35, Decay(10, start=30))  # a decay from elsewhere
    assert resume_decay(stable, 10, folder=tmp_path) == (stable, Decay(10, start=20))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write(last, 25, Decay(10, start=20))
    assert resume_decay(stable, 10, folder=elsewhere) == (stable, Decay(10, start=20))
    own = write(elsewhere / "last.ckpt", 27, Decay(10, start=20))
    assert resume_decay(stable, 10, folder=elsewhere) == (own, Decay(10, start=20))
    last.write_bytes(last.read_bytes()[:-1])
    assert resume_decay(stable, 10, folder=tmp_path) == (stable, Decay(10, start=20))


@pytest.mark.parametrize("steps", [0, 12])
def test_a_decay_of_another_length_is_refused_unless_told_to(tmp_path, steps):
    last = write(tmp_path / "last.ckpt", 25, Decay(10, start=20))
    with pytest.raises(ResumeError, match=r"decay_steps=10 to continue it, or .*anyway=true"):
        resume_decay(last, steps, folder=tmp_path)
    stable = write(tmp_path / "stable.ckpt", 20)
    with pytest.raises(ResumeError, match=f"resume={stable} for the run before the decay"):
        resume_decay(last, steps, folder=tmp_path)
    expected = Decay(steps, start=25 if steps else None)
    assert resume_decay(last, steps, folder=tmp_path, strict=False) == (last, expected)


def test_a_decay_may_start_without_resume_anyway(tmp_path):
    last = write(tmp_path / "last.ckpt", 20)
    record = {"config": {"seed": 0}, "decay": Decay(10, start=20)._asdict()}
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
