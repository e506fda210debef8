"""The guard on a GPU, where it must not wait, and with float16's scaled gradients."""

import json

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from unclip.training import lightning_compat
from unclip.training.callbacks.checkpoint import NonFiniteError
from unclip.training.callbacks.outputs import Export


@pytest.fixture
def on_gpu(monkeypatch):
    """Reading is allowed at logged steps only."""
    monkeypatch.setattr(lightning_compat, "may_wait", lightning_compat.is_logged_step)


def failing(kit, *callbacks, steps=10, every_steps=1000, **settings):
    """Train on NaN in step 2; return the steps that were taken before the end."""
    taken = []
    hooks = {"on_train_batch_end": lambda self, *_: taken.append(self.global_step)}
    callbacks = (*kit.callbacks(every_steps=every_steps), *callbacks)
    data, module = kit.ImageData(poisoned=9), kit.module(hooks=hooks)
    with pytest.raises(NonFiniteError, match=r"^step 2: the loss is nan"):
        kit.fit(steps, *callbacks, module=module, data=data, **settings)
    return taken


def test_a_gpu_is_asked_at_logged_steps_and_the_first_bad_step_is_named(kit, on_gpu):
    assert failing(kit, log_every_n_steps=5) == [1, 2, 3, 4]  # 5 is checked before it is taken
    about = json.loads((kit.folder / "nonfinite_2_0.json").read_text())
    assert about["step"] == 2 and about["keys"] == [f"{k:08d}" for k in range(8, 12)]


def test_bad_weights_are_not_saved(kit, on_gpu):
    assert failing(kit, every_steps=2, log_every_n_steps=50) == [1, 2, 3, 4]
    assert kit.saved()["global_step"] == 2
    assert all(torch.isfinite(weight).all() for weight in kit.saved()["state_dict"].values())


def test_bad_weights_are_not_exported(kit, on_gpu, monkeypatch):
    monkeypatch.setattr("unclip.training.callbacks.outputs.save_stage", pytest.fail)
    export = Export(kit.folder / "x.safetensors", metric="")
    failing(kit, export, steps=4, log_every_n_steps=50)


def fit_scaled(kit, steps, scale, *, module=None, poisoned=None):
    """Train on a CPU, for which Lightning has no float16, with a gradient scaler."""
    trainer = kit.trainer(steps, *kit.callbacks())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.strategy._precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer.fit(module or kit.module(), kit.ImageData(poisoned))
    return scaler, trainer


def test_a_step_that_the_scaler_skips_is_no_failure(kit):
    module, start = kit.module(), kit.module().stage.network[0].weight
    scaler, trainer = fit_scaled(kit, 16, 2.0**24, module=module)  # overflows at first
    assert 1 < scaler.get_scale() < 2.0**24
    assert not torch.equal(module.stage.network[0].weight, start)
    averages = trainer.callbacks[0].weights.values()
    assert {average.dtype for average in averages} == {torch.float32}


def test_a_loss_that_is_nan_is_a_failure_also_with_a_scaler(kit):
    with pytest.raises(NonFiniteError, match="step 2: the loss is nan"):
        fit_scaled(kit, 8, 4.0, poisoned=9)


def test_gradients_are_clipped_after_they_are_unscaled(kit):
    """The norm is that of float32 training, although the gradients are scaled."""
    norms, expected = [], []

    def note(self, optimizer):
        norms.append(self.gradient_norm().item())
        gradients = [p.grad.flatten() for p in self.parameters() if p.grad is not None]
        expected.append(torch.cat(gradients).norm().item())

    hooks = {"on_before_optimizer_step": note}
    kit.fit(1, module=kit.module(hooks=hooks))
    fit_scaled(kit, 1, 2.0**10, module=kit.module(hooks=hooks))
    assert norms == pytest.approx(expected)
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_bf16_mixed_keeps_weights_averages_and_statistics_in_float32(kit):
    module, trainer = kit.fit(3, precision="bf16-mixed")
    averages = trainer.callbacks[0].weights
    tensors = [*module.stage.parameters(), module.stage.mean, *averages.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    start, name = kit.module().stage, "network.0.weight"
    assert not torch.equal(averages[name], start.get_parameter(name))
