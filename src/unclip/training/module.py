"""The base of every stage's LightningModule: what training adds to a stage, and no more."""

import json
from collections.abc import Callable, Iterator, Mapping
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from unclip.clip import ClipEmbedder
from unclip.stages import Stage
from unclip.training.optim import clip_gradients, gradient_norm, parameter_groups
from unclip.training.seeding import sample_generators
from unclip.training.sharding import ShardedStrategy, gather, is_sharded, scatter, shard

Batch = dict[str, Any]


class StageModule(LightningModule):
    """Trains a stage.

    Args:
        stage: what is trained.
        recipe: the plain dict that the stage was built from; it travels in checkpoints and exports.
        optimizer: `optimizer(parameter_groups) -> Optimizer`.
        schedule: `factor(step, max_steps)` on the learning rate.
        embedder: the frozen CLIP for stages that need one. It is a plain object: neither moved,
            saved, averaged nor wrapped with the module.
        fitted: the stage's statistics are there already, with weights that a run starts from.
        name: what the run calls the stage; a judge is a stage "clip" by another name.
        seed: of the noise that validation samples start from.

    Attributes:
        last_loss: of the last training batch, detached.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        recipe: dict[str, Any],
        optimizer: Callable[[list[dict]], Optimizer],
        schedule: Callable[[int, int], float],
        embedder: ClipEmbedder | None = None,
        fitted: bool = False,
        name: str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if stage.needs_clip and embedder is None:
            raise ValueError(
                f"the stage {stage.name} is trained on CLIP's features: give it an embedder"
            )
        self.stage = stage.to(memory_format=torch.channels_last)
        self.recipe = recipe
        self.embedder = embedder
        self.fitted = fitted
        self.name = name or stage.name
        self.seed = seed
        self.last_loss = torch.zeros(())
        self._optimizer = optimizer
        self._schedule = schedule
        self._gradient_norm: Tensor | None = None

    def prepare(self, batch: Batch) -> Batch:
        """A loader's batch, on this module's device, as the stage takes it.

        Images go from uint8 to [-1, 1]; the embedder adds CLIP's features.
        """
        batch = dict(batch)
        for name in ("image", "low_res"):
            if name in batch and batch[name].dtype == torch.uint8:
                image = batch[name].to(self.device, memory_format=torch.channels_last)
                batch[name] = image.float().div_(127.5).sub_(1.0)
        if self.embedder is not None:
            batch = self.embedder.to(self.device)(batch)
        return batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Prepares what Lightning has moved to the device."""
        return self.prepare(batch)

    def configure_model(self) -> None:
        """Shards the stage where the strategy says so."""
        if isinstance(self.trainer.strategy, ShardedStrategy) and not is_sharded(self.stage):
            shard(self.stage, self.device_mesh["data_parallel"])

    def on_validation_start(self) -> None:
        """Gathers a sharded stage: each rank validates, and rank 0 draws, with whole weights."""
        gather(self.stage)

    def on_validation_end(self) -> None:
        """Leaves this rank its shards."""
        scatter(self.stage)

    def on_fit_start(self) -> None:
        """Fits the stage's statistics on rank 0 and hands them to all, unless it has them."""
        if self.trainer.ckpt_path is not None or self.fitted:
            return
        if (
            type(self.stage).fit_statistics is not Stage.fit_statistics
            and self.trainer.is_global_zero
        ):
            self.stage.fit_statistics(self.training_batches())
        if self.trainer.world_size > 1:
            for buffer in self.stage.buffers():
                torch.distributed.broadcast(buffer, src=0)
        if self.embedder is not None:  # scaled by the statistics, so after them
            self.stage.fit_null_text(self.embedder.to(self.device).text([""])._asdict())

    def on_train_start(self) -> None:
        """Gives what a checkpoint brought the strides of its parameters.

        Fused optimizers go through memory as it lies, and a run with shards saves it contiguous.
        """
        for optimizer in self.trainer.optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if value.shape == parameter.shape and value.stride() != parameter.stride():
                        state[name] = torch.empty_like(parameter).copy_(value)

    @torch.no_grad()
    def training_batches(self) -> Iterator[Batch]:
        """This rank's batches from the first on, prepared, for what is fitted and not trained."""
        for batch in self.trainer.datamodule.train_dataloader():
            yield self.prepare(self.transfer_batch_to_device(batch, self.device, 0))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The stage's loss, its parts logged."""
        losses = self.stage.loss(batch)
        self.last_loss = losses["loss"].detach()
        if self._logs_this_step():
            self._log_all("train", _over_ranks(losses, self.trainer.world_size), batch)
        return losses["loss"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The stage's loss, and whatever else tells how good it is."""
        values = {"loss": self.stage.loss(batch)["loss"], **self.measure(batch)}
        self._log_all(
            "validation", values, batch
        )  # the same names on all ranks, or they would hang

    def measure(self, batch: Batch) -> dict[str, Tensor | float]:
        """Mean scores over a validation batch; the stage's weights are the averaged ones."""
        return {}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Rows of pictures `B 3 H W` in [-1, 1] that show what the stage does, or nothing."""
        return {}

    def generators(self, batch: Batch) -> list[torch.Generator]:
        """A generator for each sample of a validation batch, the same at every validation."""
        return sample_generators(batch["key"], self.seed)

    def _logs_this_step(self) -> bool:
        """Whether the loggers will look; to log at every step would cost a small stage time."""
        return (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0

    def _log_all(self, prefix: str, values: Mapping[str, Tensor | float], batch: Batch) -> None:
        self.log_dict(
            {f"{prefix}/{name}": value for name, value in values.items()},
            batch_size=float(batch["valid"].sum()),  # whole ones Lightning rounds over the ranks
            sync_dist=prefix == "validation",
        )

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer over the trainable weights, its learning rate scheduled by the step."""
        optimizer = self._optimizer(parameter_groups(self.stage))
        max_steps = self.trainer.max_steps
        scheduler = LambdaLR(optimizer, lambda step: self._schedule(step, max_steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def gradient_norm(self) -> Tensor:
        """The norm of the present gradients, measured once a step."""
        if self._gradient_norm is None:
            self._gradient_norm = gradient_norm(self.stage.parameters())
        return self._gradient_norm

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the gradient's norm and the learning rate."""
        if self._logs_this_step():
            lr = optimizer.param_groups[0]["lr"]
            self.log_dict({"train/gradient_norm": self.gradient_norm(), "train/learning_rate": lr})

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the norm that was measured for the guard and the log."""
        if gradient_clip_val:
            clip_gradients(self.stage.parameters(), gradient_clip_val, self.gradient_norm())

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Forgets the last step's gradient norm."""
        self._gradient_norm = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what the weights belong to, as text: nothing but plain values goes into the file."""
        fingerprint = None if self.embedder is None else self.embedder.fingerprint
        about = {"stage": self.stage.name, "recipe": self.recipe, "clip_fingerprint": fingerprint}
        checkpoint["unclip"] = json.dumps(about)


def _over_ranks(losses: Mapping[str, Tensor], ranks: int) -> Mapping[str, Tensor | float]:
    """Their means over all ranks; of a loss that not all ranks have, over those that do."""
    if ranks == 1:
        return losses
    found: list[Any] = [None] * ranks
    own = {name: value.item() for name, value in losses.items()}
    torch.distributed.all_gather_object(found, own)
    names = sorted({name for values in found for name in values})
    return {name: fmean(values[name] for values in found if name in values) for name in names}
