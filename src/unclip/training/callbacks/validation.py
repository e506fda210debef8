"""A last validation after the last step, whatever the interval."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class LastValidation(Callback):
    """Makes the last step one that validates, so that what is exported has its scores."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the next validation to the last step."""
        if trainer.global_step == trainer.max_steps and trainer.val_check_batch is not None:
            trainer.val_check_batch = trainer.fit_loop.total_batch_idx + 1
