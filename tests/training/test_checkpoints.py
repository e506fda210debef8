import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from unclip.training.callbacks.checkpoint import AtomicCheckpointIO
from unclip.training.callbacks.guard import NonFiniteError
from unclip.training.modules import StageModule
from unclip.training.resume import CheckpointError, ResumeError


def train(kit, steps, *, folder, resume=None, every_steps=1000, module=None, data=None, **settings):
    callbacks = kit.callbacks(folder, every_steps=every_steps)
    trainer = kit.trainer(steps, *callbacks, folder=folder, **settings)
    module = module or kit.module()
    trainer.fit(module, data or kit.ImageData(), ckpt_path=resume)
    return module, callbacks[0], trainer


def test_a_resumed_run_equals_an_uninterrupted_one(kit, tmp_path):
    """Weights, averages and noise after 16 + 8 steps, beyond an epoch, equal those of 24 steps."""
    whole, whole_ema, _ = train(kit, 24, folder=tmp_path / "whole")
    train(kit, 24, folder=tmp_path / "cut", every_steps=16, module=(first := kit.module(Cut)))
    path = tmp_path / "cut" / "last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 16
    second, second_ema, trainer = train(kit, 24, folder=tmp_path / "again", resume=path)
    assert trainer.global_step == 24
    assert first.stage.noises[:16] + second.stage.noises == whole.stage.noises
    assert first.stage.keys[: 16 * 4] + second.stage.keys == whole.stage.keys
    for name, value in whole.stage.state_dict().items():
        assert torch.equal(second.stage.state_dict()[name], value), name
    for name, value in whole_ema.weights.items():
        assert torch.equal(second_ema.weights[name], value), name
    assert second_ema.updates == 24


class Cut(StageModule):
    """Fails in its 19th step, without a save."""

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 18:
            self.trainer.callbacks[-1].every_steps = 10**9  # do not save after the exception
            self.trainer.callbacks[-1]._saved_step = 18
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


@pytest.fixture(autouse=True)
def expect_cut(monkeypatch):
    """Lets `train` return when `Cut` fails."""
    from lightning.pytorch import Trainer

    fit = Trainer.fit

    def forgiving(self, module, *args, **settings):
        if isinstance(module, Cut):
            with pytest.raises(ZeroDivisionError):
                fit(self, module, *args, **settings)
        else:
            fit(self, module, *args, **settings)

    monkeypatch.setattr(Trainer, "fit", forgiving)


def test_a_checkpoint_holds_plain_values_only(kit, tmp_path):
    train(kit, 2, folder=tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "hyper_parameters" not in saved
    assert not list(tmp_path.glob(".*tmp"))


def test_the_last_step_is_saved_at_any_interval(kit, tmp_path):
    train(kit, 5, folder=tmp_path, every_steps=3)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 5


def test_an_error_saves_the_run_before_it_ends(kit, tmp_path):
    class Failing(StageModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 3:
                raise MemoryError
            return super().training_step(batch, batch_idx)

    with pytest.raises(MemoryError):
        train(kit, 9, folder=tmp_path, module=kit.module(Failing))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


@pytest.fixture
def hang_up():
    """Return a function that sets the handler of SIGHUP until the test ends."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


def test_a_run_under_nohup_ignores_that_its_shell_exits(kit, tmp_path, hang_up):
    class HungUp(StageModule):
        def training_step(self, batch, batch_idx):
            os.kill(os.getpid(), signal.SIGHUP)
            return super().training_step(batch, batch_idx)

    hang_up(signal.SIG_IGN)
    *_, trainer = train(kit, 2, folder=tmp_path, module=kit.module(HungUp))
    assert trainer.global_step == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_a_complete_step_and_prints_how_to_resume(
    kit, tmp_path, capsys, number, hang_up
):
    class Signalled(StageModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 4:
                os.kill(os.getpid(), number)
            return super().training_step(batch, batch_idx)

    hang_up(signal.SIG_DFL)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        train(kit, 9, folder=tmp_path, module=kit.module(Signalled))
    assert stopped.value.code == 128 + number
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 5
    assert f"resume={tmp_path}/last.ckpt" in capsys.readouterr().out
    assert signal.getsignal(number) == before


def test_a_signal_in_validation_saves_the_raw_weights(kit, tmp_path):
    class Signalled(StageModule):
        def validation_step(self, batch, batch_idx):
            os.kill(os.getpid(), signal.SIGINT)

    module = kit.module(Signalled)
    with pytest.raises(SystemExit):
        train(kit, 9, folder=tmp_path, module=module, validate_every_steps=4)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    for name, parameter in module.stage.named_parameters():
        assert torch.equal(saved["state_dict"][f"stage.{name}"], parameter)
    _, _, trainer = train(kit, 9, folder=tmp_path / "again", resume=tmp_path / "last.ckpt")
    assert trainer.global_step == 9


def test_nan_stops_the_run_before_it_reaches_weights_or_checkpoints(kit, tmp_path):
    data = kit.ImageData(poisoned=21)  # of the sixth batch
    module = kit.module()
    with pytest.raises(NonFiniteError, match="step 5"):
        train(kit, 9, folder=tmp_path, module=module, data=data, every_steps=4)
    assert all(torch.isfinite(p).all() for p in module.stage.parameters())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert '"00000021"' in (tmp_path / "nonfinite_5_0.json").read_text()


def test_a_missing_checkpoint_never_starts_a_new_run(kit, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(kit, 2, folder=tmp_path, resume=tmp_path / "nowhere.ckpt")


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


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"step": torch.tensor(1)}, path)

    def full(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        io.save_checkpoint({"step": torch.tensor(2)}, path)
    assert io.load_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.ckpt"]


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
    assert io.load_checkpoint(path)["global_step"] == 1
    io.save_checkpoint({"global_step": 3}, path)
    assert io.load_checkpoint(path)["global_step"] == 3
    assert io.load_checkpoint(tmp_path / "previous.ckpt")["global_step"] == 1


def test_a_run_on_a_full_disk_ends_without_another_save(kit, tmp_path, monkeypatch):
    saves = []

    def full(checkpoint, file):
        saves.append(checkpoint["global_step"])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"step 4 .*No space left.*there is no earlier one"):
        train(kit, 9, folder=tmp_path, every_steps=4)
    assert saves == [4]


KILLED = """
import sys, torch
sys.path.insert(0, {source!r})
from unclip.training.callbacks.checkpoint import AtomicCheckpointIO
big = {{"weights": torch.zeros(4_000_000)}}
while True:
    AtomicCheckpointIO().save_checkpoint(big, {path!r})
"""


def test_a_kill_during_a_write_leaves_an_intact_file(tmp_path):
    """Even if the temporary folder is on another disk, where Lightning's own writer fails."""
    path, source = tmp_path / "last.ckpt", os.path.abspath("src")
    other_disk = {"TMPDIR": "/dev/shm"} if os.path.isdir("/dev/shm") else {}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(source=source, path=str(path))],
        env=os.environ | other_disk,
    )
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)  # most likely in a later write
    process.kill()
    process.wait()
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert loaded["weights"].shape == (4_000_000,)
