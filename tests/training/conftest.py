"""A stage, data and a trainer that are small enough to test training itself."""

import unclip  # isort: skip # noqa: F401 (first: lets torchvision load next to a CPU torch)

import functools

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

import unclip.training.trainer as trainer_module
from unclip.stages import Stage
from unclip.training import optim
from unclip.training.callbacks import progress
from unclip.training.callbacks.checkpoint import NonFiniteGuard, RunCheckpoint
from unclip.training.callbacks.ema import EMA
from unclip.training.modules import StageModule


class TinyStage(Stage):
    """Predicts an image's mean color; has dropout, a norm, a frozen weight, an integer buffer."""

    name = "tiny"
    needs_clip = False

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Dropout(0.1), nn.Conv2d(8, 3, 1)
        )
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(3))
        self.noises: list[float] = []
        self.keys: list[str] = []

    def loss(self, batch):
        noise = torch.randn_like(batch["image"])
        if self.training:
            self.noises.append(noise.flatten()[0].item())
            self.keys += batch["key"]
        return self.loss_from(batch["image"], noise, batch)

    def loss_from(self, image, noise, batch):
        error = self.network(image + 0.1 * noise) - image.mean((2, 3), keepdim=True)
        return {"loss": error.square().mean() * batch.get("factor", 1.0)}

    def fit_statistics(self, batches):
        images = torch.cat([batch["image"] for batch in batches])
        self.mean.copy_(images.mean((0, 2, 3)))


def images(count):
    """Return samples of 4 px."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, 3, 4, 4)
    return list(enumerate(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)))


def collate(samples, poisoned=None):
    """Make a batch; the sample `poisoned` makes its loss NaN."""
    indices, pixels = zip(*samples, strict=True)
    batch = {
        "key": [f"{index:08d}" for index in indices],
        "caption": ["an image"] * len(indices),
        "image": torch.stack(pixels),
        "valid": torch.ones(len(indices), dtype=torch.bool),
    }
    if poisoned in indices:
        batch["factor"] = torch.tensor(float("nan"))
    return batch


class ImageData(LightningDataModule):
    def __init__(self, poisoned=None):
        super().__init__()
        self.poisoned = poisoned

    def train_dataloader(self):
        poison = functools.partial(collate, poisoned=self.poisoned)
        return DataLoader(images(64), batch_size=4, collate_fn=poison)

    def caption_loader(self):
        return [{"caption": ["an image"]}]

    def val_dataloader(self):
        return DataLoader(images(8), batch_size=4, collate_fn=collate)


class Kit:
    """Builds modules and trainers with the settings that a test varies."""

    TinyStage, ImageData = TinyStage, ImageData

    def __init__(self, folder):
        self.folder = folder

    def module(self, cls=StageModule, stage=TinyStage, hooks=None, **settings):
        """Build a module, some of whose methods are replaced by `hooks`."""
        torch.manual_seed(0)
        cls = type("Hooked", (cls,), hooks) if hooks else cls
        defaults = {
            "recipe": {"_target_": "tiny"},
            "optimizer": functools.partial(torch.optim.AdamW, lr=1e-2, fused=True),
            "schedule": functools.partial(optim.cosine, warm_up_steps=2),
        }
        return cls(stage(), **(defaults | settings))

    def trainer(self, max_steps, *callbacks, **settings):
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "loggers": [],
            "gradient_clip_val": 1.0,
            "validate_every_steps": 1000,
            "num_sanity_val_steps": 0,
        }
        return trainer_module.build_trainer(
            max_steps=max_steps, folder=self.folder, callbacks=callbacks, **(defaults | settings)
        )

    def callbacks(self, every_steps=1000):
        checkpoint = RunCheckpoint(self.folder, every_steps=every_steps)
        return [EMA(0.9), NonFiniteGuard(self.folder), checkpoint]

    def fit(self, steps, *callbacks, module=None, data=None, resume=None, **settings):
        """Train, by default TinyStage with an EMA, the guard and checkpoints."""
        trainer = self.trainer(steps, *(callbacks or self.callbacks()), **settings)
        module = module or self.module()
        trainer.fit(module, data or ImageData(), ckpt_path=resume)
        return module, trainer

    def saved(self):
        """Load the last checkpoint."""
        return torch.load(self.folder / "last.ckpt", weights_only=True)


@pytest.fixture
def kit(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "forward_flops", lambda recipe, batch: 1_000_000)  # no recipe
    trainer_module.silence_lightning()
    return Kit(tmp_path)
