import math

import pytest
import torch

from unclip.training.callbacks.ema import EMA, averaged_weights


class Recorder(EMA):
    """Records the raw weights after each step."""

    def __init__(self, decay):
        super().__init__(decay)
        self.history = []

    def on_train_batch_end(self, *args):
        self.history.append({name: p.detach().clone() for name, p in self._parameters.items()})
        super().on_train_batch_end(*args)


def raw_weights(module):
    return {name: p.detach().clone() for name, p in module.stage.named_parameters()}


def test_the_average_of_trained_weights_has_its_closed_form(kit):
    module, ema = kit.module(), Recorder(0.3)
    start = raw_weights(module)
    kit.fit(5, ema, module=module)
    decays = [2 / 11, 3 / 12, 0.3, 0.3, 0.3]  # (1 + t) / (10 + t), at most 0.3
    for name, average in ema.weights.items():
        # a_k = Π d_i w_0 + Σ (1 - d_i) Π_(j > i) d_j w_i
        expected = math.prod(decays) * start[name]
        for i, weights in enumerate(ema.history):
            expected = expected + (1 - decays[i]) * math.prod(decays[i + 1 :]) * weights[name]
        torch.testing.assert_close(average, expected)
    trained = {name for name, p in module.stage.named_parameters() if p.requires_grad}
    assert ema.weights.keys() == trained
    assert "frozen" not in ema.weights


def test_accumulated_batches_are_one_update(kit):
    kit.fit(3, ema := EMA(), accumulate_grad_batches=2)
    assert ema.updates == 3


def test_validation_uses_the_averages_and_training_the_raw_weights(kit):
    seen = []
    module = kit.module(hooks={"validation_step": lambda self, *_: seen.append(raw_weights(self))})
    kit.fit(4, ema := Recorder(0.9), module=module)
    for name, average in ema.weights.items():
        assert torch.equal(seen[-1][name], average)
        assert torch.equal(raw_weights(module)[name], ema.history[-1][name])
        assert not torch.equal(average, ema.history[-1][name])


def test_an_exception_undoes_the_swap(kit):
    module, trainer = kit.fit(3, ema := EMA(0.9))
    name, before = "network.0.weight", raw_weights(module)
    with pytest.raises(ZeroDivisionError), averaged_weights(trainer):
        with averaged_weights(trainer):  # nested: swapped once
            assert not torch.equal(module.stage.get_parameter(name), ema.weights[name])
            assert not torch.equal(module.stage.get_parameter(name), before[name])
        raise ZeroDivisionError
    torch.testing.assert_close(raw_weights(module), before, rtol=0, atol=0)


@pytest.mark.parametrize("save_inside", [False, True])
def test_a_crash_in_validation_keeps_both_sets_in_their_places(kit, save_inside):
    def crash(self, *_):
        if save_inside:
            self.trainer.save_checkpoint(kit.folder / "last.ckpt")
        raise ZeroDivisionError

    callbacks = [ema := Recorder(0.9), *kit.callbacks()[1:]]
    module = kit.module(hooks={"validation_step": crash})
    with pytest.raises(ZeroDivisionError):
        kit.fit(6, *callbacks, module=module, validate_every_steps=4)
    saved = kit.saved()
    assert saved["global_step"] == 4
    averages = saved["callbacks"]["Recorder"]["weights"]
    for name, raw in ema.history[-1].items():
        assert torch.equal(saved["state_dict"][f"stage.{name}"], raw)
        assert torch.equal(averages[name], ema.weights[name])
        assert not torch.equal(raw, averages[name])
