"""Everything that relies on Lightning's internals, except the FSDP strategy in sharding.py.

Review both when Lightning's version changes; pyproject.toml allows 2.6 only.
"""

from typing import Any, TypeVar, cast

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger

C = TypeVar("C", bound=Callback)


def find_callback(trainer: Trainer, kind: type[C]) -> C | None:
    """Return the trainer's callback of a class, if it has one."""
    return next((one for one in cast(Any, trainer).callbacks if isinstance(one, kind)), None)


def is_logged_step(trainer: Trainer, step: int) -> bool:
    """Return whether the loggers want a step; logging every step slows small stages."""
    return step % cast(Any, trainer).log_every_n_steps == 0


def may_wait(trainer: Trainer, step: int) -> bool:
    """Return whether a step may read values from the device: on a GPU, only a logged step."""
    return trainer.strategy.root_device.type == "cpu" or is_logged_step(trainer, step)


def batches_started(trainer: Trainer) -> int:
    """Return the number of training batches before the current one, over the whole run."""
    return trainer.fit_loop.total_batch_idx


def is_within_step(trainer: Trainer) -> bool:
    """Return whether some batches of an accumulated step are done and others are not."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return progress.current.processed % trainer.accumulate_grad_batches > 0


def sync_logged_step(trainer: Trainer) -> None:
    """Let the loggers count optimizer steps; Lightning's own count is off after a resume."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def validate_after_batch(trainer: Trainer) -> None:
    """Start a validation after the current training batch, if the run validates at all."""
    if trainer.val_check_batch is not None:
        trainer.val_check_batch = trainer.fit_loop.total_batch_idx + 1


def remove_deprecated_wandb_option(logger: WandbLogger) -> None:
    """Drop "anonymous" from a W&B logger: wandb warns about it, whatever its value."""
    logger._wandb_init.pop("anonymous", None)


def rewind_to_step(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Rewrite a checkpoint's loop counters in place, so that a run resumes exactly.

    Wherever a checkpoint is written (within a step, in validation, after the last step), its
    counters then say that `trainer.global_step` steps are complete and the next has not started.
    Batches of an incomplete step are consumed again.
    """
    fit_loop = checkpoint["loops"]["fit_loop"]
    progress = fit_loop["epoch_loop.batch_progress"]
    batches, total = progress["current"]["processed"], progress["total"]["processed"]
    epoch = fit_loop["epoch_progress"]["total"]["started"] - 1
    if batches >= trainer.num_training_batches:
        epoch, batches = epoch + 1, 0
    incomplete = batches % trainer.accumulate_grad_batches
    batches -= incomplete
    progress["current"] = dict.fromkeys(progress["current"], batches)
    progress["total"] = dict.fromkeys(progress["total"], total - incomplete)
    progress["is_last_batch"] = False
    for counters in (fit_loop["epoch_progress"]["current"], fit_loop["epoch_progress"]["total"]):
        counters |= {"ready": epoch + 1, "started": epoch + 1}
        counters |= {"processed": epoch, "completed": epoch}
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    validation["total"] = dict.fromkeys(validation["total"], validation["total"]["completed"])
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step
    for loader in fit_loop["state_dict"].get("combined_loader", []):
        loader["batches"] = batches
