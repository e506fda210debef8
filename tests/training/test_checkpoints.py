"""Checkpoint files and when they are written; what happens to a run at signals and errors."""

import os
import resource
import signal

import pytest
import torch

from unclip.training.callbacks.checkpoint import NonFiniteError
from unclip.training.modules import StageModule
from unclip.training.resume import CheckpointError, ResumeError
from unclip.training.trainer import AtomicCheckpointIO


def at_step(step, action):
    """Return a hook that calls `action` in the training batch after a step."""

    def training_step(module, batch, batch_idx):
        if module.global_step == step:
            action()
        return StageModule.training_step(module, batch, batch_idx)

    return {"training_step": training_step}


def test_the_last_step_is_saved_at_any_interval_in_plain_values(kit, tmp_path):
    kit.fit(5, *kit.callbacks(every_steps=3))
    assert kit.saved()["global_step"] == 5
    assert "hyper_parameters" not in kit.saved()
    assert not list(tmp_path.glob(".*tmp"))


def test_an_error_saves_the_run_before_it_ends(kit):
    with pytest.raises(ZeroDivisionError):
        kit.fit(9, module=kit.module(hooks=at_step(3, lambda: 1 / 0)))
    assert kit.saved()["global_step"] == 3


@pytest.fixture
def hang_up():
    """Return a function that sets the handler of SIGHUP until the test ends."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


def test_a_run_under_nohup_ignores_that_its_shell_exits(kit, hang_up):
    hang_up(signal.SIG_IGN)
    module = kit.module(hooks=at_step(0, lambda: os.kill(os.getpid(), signal.SIGHUP)))
    assert kit.fit(2, module=module)[1].global_step == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_a_complete_step_and_prints_how_to_resume(
    kit, tmp_path, capsys, number, hang_up
):
    hang_up(signal.SIG_DFL)
    before = signal.getsignal(number)
    hooks = at_step(4, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stopped:
        kit.fit(9, module=kit.module(hooks=hooks))
    assert stopped.value.code == 128 + number
    assert kit.saved()["global_step"] == 5
    assert f"resume={tmp_path}/last.ckpt" in capsys.readouterr().out
    assert signal.getsignal(number) == before


def test_nan_stops_the_run_before_it_reaches_weights_or_checkpoints(kit, tmp_path):
    module, data = kit.module(), kit.ImageData(poisoned=21)  # of the sixth batch
    with pytest.raises(NonFiniteError, match="step 5"):
        kit.fit(9, *kit.callbacks(every_steps=4), module=module, data=data)
    assert all(torch.isfinite(p).all() for p in module.stage.parameters())
    assert kit.saved()["global_step"] == 4
    assert '"00000021"' in (tmp_path / "nonfinite_5_0.json").read_text()


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ResumeError, match="could run code"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_a_checkpoint_is_not_read_into_memory_of_this_process(tmp_path):
    """On a machine of eight ranks it would be read eight times."""
    path = tmp_path / "last.ckpt"
    torch.save({"weights": torch.ones(16 * 2**20)}, path)
    before = private_mib()
    saved = AtomicCheckpointIO().load_checkpoint(path)
    assert saved["weights"].sum() == 16 * 2**20
    assert private_mib() - before < 16  # of 64


def private_mib():
    with open("/proc/self/smaps_rollup") as file:
        lines = dict(line.split(":") for line in file if line.startswith("Anonymous:"))
    return int(lines["Anonymous"].split()[0]) / 1024


def test_a_full_disk_is_reported_and_the_earlier_checkpoint_kept(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"global_step": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"of step 2 to .*last\.ckpt from before is kept"):
            io.save_checkpoint({"global_step": 2, "weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert io.load_checkpoint(path)["global_step"] == 1
    io.save_checkpoint({"global_step": 3}, path)
    assert io.load_checkpoint(path)["global_step"] == 3
    assert io.load_checkpoint(tmp_path / "previous.ckpt")["global_step"] == 1


def test_a_run_on_a_full_disk_ends_without_another_save(kit, monkeypatch):
    saves = []

    def full(checkpoint, file):
        saves.append(checkpoint["global_step"])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"step 4 .*No space left.*there is no earlier one"):
        kit.fit(9, *kit.callbacks(every_steps=4))
    assert saves == [4]
