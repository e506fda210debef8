"""Lightning's Trainer as unclip uses it: steps in place of epochs, and none of its small talk."""

import ctypes
import logging
import signal
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy

from unclip.training.acceleration import has_native_bf16
from unclip.training.checkpoint_io import AtomicCheckpointIO
from unclip.training.sharding import ShardedStrategy

# Of Lightning's warnings, those that tell a user of unclip nothing to act on.
_IRRELEVANT = (
    ".*does not have many workers.*",
    ".*module\\(s\\) in eval mode at the start of training.*",
    ".*IterableDataset.*has `__len__` defined.*",
    ".*The number of training batches.*is smaller than the logging interval.*",
    ".*GPU available but not used.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*You have overridden `on_after_batch_transfer` in `LightningModule`.*",
    ".*torch.distributed.nn.functional.all_gather is deprecated.*",  # open_clip calls it
    ".*FSDP2-wrapped module .* returned a view tensor.*",  # nothing is done to them in place
)


def resolve_precision(precision: str | int, accelerator: str) -> str | int:
    """What "auto" stands for: bf16 where the hardware has it, else float32.

    On a CPU without native bf16 the emulated kernels are a hundred times slower than float32.

    Raises:
        ValueError: for float16, whose scaled gradients the guard and the clipping would misjudge.
    """
    if str(precision) in ("16", "16-mixed", "16-true"):
        raise ValueError(f"precision {precision}: take bf16-mixed or 32-true")
    if precision != "auto":
        return precision
    device = "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    return "bf16-mixed" if has_native_bf16(device) else "32-true"


def quieten() -> None:
    """Silences what Lightning says of itself; warnings and errors that matter stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _IRRELEVANT:
        warnings.filterwarnings("ignore", message)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks: a CPU training step is 5 to 8% faster without page faults.

    It has to happen before the first large allocation; elsewhere than on Linux nothing happens.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)
    mallopt(mmap_max, 0)


def end_with_parent() -> None:
    """Lets this process be killed when the one that started it ends; on Linux.

    A rank that hangs would else outlive the run.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def build_trainer(
    *,
    max_steps: int,
    effort: float = 1.0,
    folder: str | Path,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
    accelerator: str = "auto",
    strategy: str = "auto",
    precision: str | int = "auto",
    validate_every_steps: int = 1000,
    accumulate_grad_batches: int = 1,
    timeout_minutes: float = 10.0,
    **settings: Any,
) -> Trainer:
    """A Trainer that counts steps, validates by steps, and saves atomically.

    Args:
        max_steps: how long to train.
        effort: multiplies `max_steps`, so that one number lengthens every stage of a scale.
        folder: the run's folder.
        callbacks: in the order in which their hooks are called.
        loggers: may be empty.
        accelerator: as Lightning's.
        strategy: as Lightning's; "ddp" and "fsdp" (FSDP2) on CPUs go through gloo.
        precision: as Lightning's, or "auto".
        validate_every_steps: between two validations; the last step always has one.
        accumulate_grad_batches: batches of a step.
        timeout_minutes: how long ranks wait for one that is dead or hangs before they fail.
        settings: anything else that Lightning's Trainer takes.
    """
    max_steps = round(max_steps * effort)
    if max_steps < 1:
        raise ValueError(f"trainer.max_steps × effort is {max_steps}; it must be at least 1")
    return Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=list(loggers),
        accelerator=accelerator,
        strategy=_strategy(strategy, timedelta(minutes=timeout_minutes)),
        precision=resolve_precision(precision, accelerator),
        val_check_interval=min(validate_every_steps, max_steps) * accumulate_grad_batches,
        check_val_every_n_epoch=None,
        accumulate_grad_batches=accumulate_grad_batches,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        plugins=[AtomicCheckpointIO(), *_environment()],
        **settings,
    )


def _strategy(name: str, timeout: timedelta) -> str | Strategy:
    if name == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True, timeout=timeout)
    if name == "fsdp":
        return ShardedStrategy(timeout=timeout)
    return name


def _environment() -> list[SLURMEnvironment]:
    """Slurm's, when it runs this: without Lightning's requeueing, which saves to another place.

    Of torchrun within a Slurm job the ranks are torchrun's.
    """
    if torch.distributed.is_torchelastic_launched() or not SLURMEnvironment.detect():
        return []
    return [SLURMEnvironment(auto_requeue=False)]
