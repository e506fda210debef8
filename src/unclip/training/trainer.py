"""Build a Lightning Trainer that counts steps, saves atomically and logs quietly."""

import ctypes
import logging
import os
import shutil
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed

from unclip.device import device_of
from unclip.evaluation.distributed import cluster_environment
from unclip.files import atomic_write
from unclip.training.acceleration import has_native_bf16
from unclip.training.resume import PREVIOUS, CheckpointError, load_checkpoint
from unclip.training.sharding import ShardedStrategy

# Warnings that give a user of unclip nothing to act on.
_IRRELEVANT = (
    ".*does not have many workers.*",
    ".*module\\(s\\) in eval mode at the start of training.*",
    ".*IterableDataset.*has `__len__` defined.*",
    ".*The number of training batches.*is smaller than the logging interval.*",
    ".*GPU available but not used.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*You have overridden `on_after_batch_transfer` in `LightningModule`.*",
    ".*torch.distributed.nn.functional.all_gather is deprecated.*",  # open_clip calls it
    ".*lr_scheduler.step\\(\\)` before `optimizer.step.*",  # float16's scaler skips a first step
    ".*FSDP2-wrapped module .* returned a view tensor.*",  # no view is changed in place
)


class AtomicCheckpointIO(CheckpointIO):
    """Write next to the target, sync, rename; load only tensors and plain containers.

    Lightning's own writer goes through the temporary folder. If that is on another disk, a kill
    leaves a truncated file under the final name. The replaced checkpoint is kept as previous.ckpt;
    the one before it is deleted first, so that at most two are on the disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write `checkpoint`; an old file at `path` stays until the new one is on the disk.

        Raises:
            CheckpointError: the disk is full, or the folder is not writable.
        """
        path = Path(path)
        previous = path.with_name(PREVIOUS)
        try:
            with atomic_write(path) as temporary:
                if path.exists():
                    previous.unlink(missing_ok=True)
                with open(temporary, "wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                if path.exists():
                    try:
                        os.link(path, previous)
                    except OSError:  # a file system without links
                        os.replace(path, previous)
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # makes the rename durable
            os.close(folder)
        except (OSError, RuntimeError) as error:  # torch turns an OSError into a RuntimeError
            free = shutil.disk_usage(path.parent).free / 2**30
            kept = " and ".join(p.name for p in (path, previous) if p.exists())
            raise CheckpointError(
                f"cannot write the checkpoint of step {checkpoint.get('global_step')} to "
                f"{path.parent} ({free:.2f} GiB free): {error}; "
                f"{f'{kept} from before is kept' if kept else 'there is no earlier one'}. Free "
                "some space and run the same command again"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Open a checkpoint; its tensors are read from the file when they are used.

        All ranks open that of rank 0, which alone has verified it.
        """
        chosen = [path]
        if distributed.is_initialized():
            distributed.broadcast_object_list(chosen, src=0)
        return load_checkpoint(Path(chosen[0]))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint, if it exists."""
        Path(path).unlink(missing_ok=True)


def resolve_precision(precision: str | int, accelerator: str) -> str | int:
    """Resolve "auto" to the fastest precision that the hardware supports natively.

    GPUs without bf16 (T4, V100) use float16 with scaled gradients. On a CPU, the kernels of
    emulated bf16 are a hundred times slower than float32.

    Raises:
        ValueError: Lightning does not know it, or the weights would be in half precision, in which
            their averages do not change.
    """
    if str(precision) not in ("auto", "bf16-mixed", "16-mixed", "32-true", "64-true", "32", "64"):
        raise ValueError(f"precision {precision} is not supported: use bf16-mixed or 32-true")
    if precision != "auto":
        return precision
    device = device_of(accelerator)
    if has_native_bf16(device):
        return "bf16-mixed"
    return "16-mixed" if device == "cuda" else "32-true"


def total_steps(max_steps: int, multiplier: float) -> int:
    """Multiply the number of steps; ValueError if none is left."""
    if (steps := round(max_steps * multiplier)) < 1:
        product = "trainer.max_steps × trainer.max_steps_multiplier"
        raise ValueError(f"{product} is {steps}: it must be at least 1")
    return steps


def silence_lightning() -> None:
    """Hide Lightning's messages about itself; warnings and errors that matter are still shown."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It ends all ranks if one of them dies, and says so.
    logging.getLogger("lightning.fabric.strategies.launchers").setLevel(logging.INFO)
    for message in _IRRELEVANT:
        warnings.filterwarnings("ignore", message)


def tune_malloc() -> None:
    """Let glibc keep freed blocks: without page faults a CPU step is 5 to 8% faster.

    Call it before the first large allocation. It has an effect on Linux only.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except OSError:  # another C library
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)
    mallopt(mmap_max, 0)


def build_trainer(
    *,
    max_steps: int,
    folder: str | Path,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
    max_steps_multiplier: float = 1.0,
    accelerator: str = "auto",
    strategy: str = "auto",
    precision: str | int = "auto",
    validate_every_steps: int = 1000,
    accumulate_grad_batches: int = 1,
    timeout_minutes: float = 10.0,
    **settings: Any,
) -> Trainer:
    """Build a Trainer that counts steps, validates by steps, and saves atomically.

    Args:
        max_steps: number of optimizer steps.
        folder: run folder.
        callbacks: callbacks, in the order in which their hooks are called.
        loggers: loggers.
        max_steps_multiplier: factor on `max_steps`, which lengthens every stage of a scale.
        accelerator: name of Lightning's accelerator; "auto" is CUDA if there is a GPU, else the
            CPU, since Apple's GPUs have no float64.
        strategy: name of Lightning's strategy; "fsdp" is FSDP2.
        precision: Lightning's name of the precision, or "auto".
        validate_every_steps: steps between two validations; the last step is always validated.
        accumulate_grad_batches: batches per step.
        timeout_minutes: how long ranks wait for a dead or hanging rank before they fail.
        settings: other arguments of Lightning's Trainer.
    """
    max_steps = total_steps(max_steps, max_steps_multiplier)
    timeout = timedelta(minutes=timeout_minutes)
    strategies = {
        "ddp": DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False, timeout=timeout),
        "fsdp": ShardedStrategy(timeout=timeout),
    }
    return Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=list(loggers),
        accelerator=device_of(accelerator) if accelerator == "auto" else accelerator,
        strategy=strategies.get(strategy, strategy),
        precision=cast(Any, resolve_precision(precision, accelerator)),
        val_check_interval=min(validate_every_steps, max_steps) * accumulate_grad_batches,
        check_val_every_n_epoch=None,
        accumulate_grad_batches=accumulate_grad_batches,
        use_distributed_sampler=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        plugins=[AtomicCheckpointIO(), cluster_environment()],
        **{"enable_model_summary": False, "enable_progress_bar": False, **settings},
    )
