"""Run by test_ddp.py: two ranks train TinyStage, and save their samples, noise and weights."""

import unclip  # isort: skip # noqa: F401

import json
import sys
from pathlib import Path

from conftest import Kit

from unclip.data.module import ShardDataModule
from unclip.training.callbacks.guard import NonFiniteError
from unclip.training.modules import StageModule
from unclip.training.trainer import silence_lightning


class Poisoned(StageModule):
    """Has a NaN loss in the third step of rank 1."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 2 and self.global_rank == 1 else loss

    def measure(self, batch):
        return {"brightness": batch["image"].mean()}


def main(folder, root):
    silence_lightning()
    kit = Kit(folder)
    module = kit.module(Poisoned)
    data = ShardDataModule(root, image_size=16, shard_size=64, batch_size=4, workers=0)
    callbacks = kit.callbacks(every_steps=2)
    trainer = kit.trainer(4, *callbacks, devices=2, strategy="ddp", validate_every_steps=2)
    try:
        trainer.fit(module, data)
        failed = None
    except NonFiniteError as error:
        failed = f"NonFiniteError: {error}"
    about = {
        "keys": module.stage.keys,
        "noises": module.stage.noises,
        "mean": module.stage.mean.tolist(),
        "weight": module.stage.network[0].weight.flatten().tolist(),
        "average": callbacks[0].weights["network.0.weight"].flatten().tolist(),
        "failed": failed,
        "brightness": trainer.callback_metrics["validation/brightness"].item(),
    }
    (folder / f"rank_{trainer.global_rank}.json").write_text(json.dumps(about))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
