"""The guard on a GPU, where it must not wait, and with float16's scaled gradients."""

import json

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from unclip.training.callbacks import guard
from unclip.training.callbacks.export import Export
from unclip.training.callbacks.guard import NonFiniteError
from unclip.training.lightning_compat import is_logged_step
from unclip.training.modules import StageModule


class Counting(StageModule):
    """Notes the steps that are taken."""

    def on_train_start(self):
        self.taken = []

    def on_train_batch_end(self, *_):
        self.taken.append(self.global_step)


@pytest.fixture
def on_gpu(monkeypatch):
    """Reading is allowed at logged steps only."""
    monkeypatch.setattr(guard, "may_wait", is_logged_step)


def failing(kit, poisoned, steps=10, every_steps=1000, **settings):
    module = kit.module(Counting)
    trainer = kit.trainer(steps, *kit.callbacks(every_steps=every_steps), **settings)
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(module, kit.ImageData(poisoned))
    return str(caught.value), module.taken


def test_a_gpu_is_asked_at_logged_steps_and_the_first_bad_step_is_named(kit, on_gpu):
    message, taken = failing(kit, poisoned=9, log_every_n_steps=5)  # sample 9 is in step 2
    assert message.startswith("step 2: the loss is nan")
    assert taken == [1, 2, 3, 4]  # step 5 is checked before it is taken
    about = json.loads((kit.folder / "nonfinite_2_0.json").read_text())
    assert about["step"] == 2 and about["keys"] == [f"{k:08d}" for k in range(8, 12)]


def test_bad_weights_are_not_saved(kit, on_gpu):
    message, taken = failing(kit, poisoned=9, every_steps=2, log_every_n_steps=50)
    assert message.startswith("step 2:") and taken == [1, 2, 3, 4]
    saved = torch.load(kit.folder / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(torch.isfinite(weight).all() for weight in saved["state_dict"].values())


def test_bad_weights_are_not_exported(kit, on_gpu, monkeypatch):
    monkeypatch.setattr("unclip.training.callbacks.export.save_stage", pytest.fail)
    module, export = kit.module(), Export(kit.folder / "x.safetensors", metric="")
    trainer = kit.trainer(4, *kit.callbacks(), export, log_every_n_steps=50)
    with pytest.raises(NonFiniteError, match="step 2"):
        trainer.fit(module, kit.ImageData(9))


def scaled(trainer, scale):
    """Give a trainer on a CPU, for which Lightning has no float16, a gradient scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.strategy._precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
    return scaler


def test_a_step_that_the_scaler_skips_is_no_failure(kit):
    callbacks, module = kit.callbacks(), kit.module()
    trainer = kit.trainer(16, *callbacks)
    scaler = scaled(trainer, 2.0**24)  # its gradients overflow at first
    before = {name: p.clone() for name, p in module.stage.named_parameters()}
    trainer.fit(module, kit.ImageData())
    assert 1 < scaler.get_scale() < 2.0**24
    moved = [not torch.equal(p, before[name]) for name, p in module.stage.named_parameters()]
    assert any(moved)
    assert {average.dtype for average in callbacks[0].weights.values()} == {torch.float32}


def test_a_loss_that_is_nan_is_a_failure_also_with_a_scaler(kit):
    trainer = kit.trainer(8, *kit.callbacks())
    scaled(trainer, 4.0)
    with pytest.raises(NonFiniteError, match="step 2: the loss is nan"):
        trainer.fit(kit.module(), kit.ImageData(9))


def test_gradients_are_clipped_after_they_are_unscaled(kit):
    """The norm is that of float32 training, although the gradients are scaled."""
    norms = []

    class Norms(StageModule):
        def on_before_optimizer_step(self, optimizer):
            norms.append(self.gradient_norm().item())

    for scale in (None, 2.0**10):
        trainer = kit.trainer(1, *kit.callbacks())
        if scale is not None:
            scaled(trainer, scale)
        trainer.fit(kit.module(Norms), kit.ImageData())
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_bf16_mixed_keeps_weights_averages_and_statistics_in_float32(kit):
    callbacks, module = kit.callbacks(), kit.module()
    trainer = kit.trainer(3, *callbacks, precision="bf16-mixed")
    start = {name: p.clone() for name, p in module.stage.named_parameters()}
    trainer.fit(module, kit.ImageData())
    tensors = [*module.stage.parameters(), module.stage.mean, *callbacks[0].weights.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert any(not torch.equal(w, start[name]) for name, w in callbacks[0].weights.items())
