"""How much memory a run takes."""

import resource
import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class MemoryUse(Callback):
    """Logs train/memory_gib, the most in use so far: a GPU's memory or, on a CPU, the process's."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs when the trainer does."""
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log("train/memory_gib", most_memory(pl_module.device) / 2**30)


def most_memory(device: torch.device) -> float:
    """Bytes at the highest so far."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else most * 1024)
