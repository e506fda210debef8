"""LightningModules: each adds the training logic to a stage."""

import hashlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from lightning.pytorch import LightningModule
from torch import Tensor, distributed
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from unclip.batch import Batch
from unclip.clip import ClipEmbedder, recall_at
from unclip.evaluation.similarity import psnr
from unclip.images import to_float, to_uint8
from unclip.stages import (
    AutoregressivePriorStage,
    ClipStage,
    DecoderStage,
    PriorStage,
    Stage,
    UpsamplerStage,
)
from unclip.training.lightning_compat import (
    batches_started,
    is_logged_step,
    validate_after_batch,
)
from unclip.training.optim import parameter_groups
from unclip.training.sharding import ShardedStrategy, is_sharded, replicate, reshard, shard, unshard

Scores = dict[str, Tensor | float]


def seed_of(*parts: str | int) -> int:
    """Hash words and numbers to a 63-bit seed, the same on every machine."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def gather_objects(value: Any, ranks: int) -> list[Any]:
    """Return the value of each rank on all ranks."""
    gathered = [value] * ranks
    if ranks > 1:
        distributed.all_gather_object(gathered, value)
    return gathered


def sample_generators(keys: Iterable[str], seed: int) -> list[torch.Generator]:
    """Return a CPU generator for each key, so that a sample does not depend on its batch."""
    return [torch.Generator().manual_seed(seed_of(seed, key)) for key in keys]


class StageModule(LightningModule):
    """Train a stage.

    Args:
        stage: stage to train.
        recipe: plain dict that the stage was built from, saved in exported files.
        optimizer: function that takes parameter groups and returns an optimizer.
        schedule: function `factor(step, max_steps)` that multiplies the learning rate.
        embedder: frozen CLIP, required by stages with `needs_clip`. It is a plain object, so that
            it is not moved, saved, averaged or wrapped with the module.
        statistics_loaded: the stage's statistics came with its initial weights; do not fit them.
        name: name of the run; None for the stage's name. A judge is a "clip" stage.
        seed: seed of the noise and the timesteps.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        recipe: dict[str, Any],
        optimizer: Callable[[list[dict]], Optimizer],
        schedule: Callable[[int, int], float],
        embedder: ClipEmbedder | None = None,
        statistics_loaded: bool = False,
        name: str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        assert embedder is not None or not stage.needs_clip
        cast(Any, stage).to(memory_format=torch.channels_last)
        self.stage = stage
        self.recipe = recipe
        self.embedder = embedder
        self.statistics_loaded = statistics_loaded
        self.name = name or stage.name
        self.seed = seed
        self.last_loss = torch.zeros(())  # of the last training batch, detached
        self._optimizer = optimizer
        self._schedule = schedule
        self._gradient_norm: Tensor | None = None

    @property
    def clip_fingerprint(self) -> str | None:
        """Fingerprint of the CLIP that the stage is trained with."""
        return None if self.embedder is None else self.embedder.fingerprint

    def preprocess(self, batch: Batch) -> Batch:
        """Convert uint8 images to floats in [-1, 1] and add CLIP's features."""
        converted: Any = {**batch}
        for name in converted.keys() & {"image", "low_res"}:
            image = converted[name].to(self.device, memory_format=torch.channels_last)
            converted[name] = to_float(image)
        if self.embedder is not None:
            converted = self.embedder.to(self.device)(converted)
        return cast(Batch, converted)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Preprocess a batch that Lightning moved to the device."""
        return self.preprocess(batch)

    @torch.no_grad()
    def training_batches(self) -> Iterator[Batch]:
        """Yield this rank's preprocessed training batches from the first on, to fit statistics."""
        for batch in cast(Any, self.trainer).datamodule.train_dataloader():
            yield self.preprocess(self.transfer_batch_to_device(batch, self.device, 0))

    def sample(self, batch: Batch) -> Tensor:
        """Return the stage's sample of each row; its noise is the same in every validation."""
        generators = sample_generators(batch["key"], self.seed)
        return self.stage.sample(self.stage.condition(batch), generators=generators)

    def configure_model(self) -> None:
        """Shard the stage if the strategy is FSDP."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy) and not is_sharded(self.stage):
            bf16 = self.trainer.precision == "bf16-mixed"
            shard(self.stage, strategy.device_mesh["data_parallel"], bf16=bf16)

    def on_fit_start(self) -> None:
        """Fit the stage's statistics on rank 0 and broadcast them, unless they were loaded."""
        if self.trainer.ckpt_path is not None or self.statistics_loaded:
            return
        if self.trainer.is_global_zero:
            self.stage.fit_statistics(self.training_batches())
        for buffer in self.stage.buffers() if self.trainer.world_size > 1 else ():
            fitted = buffer.clone()  # copied, so that the buffer knows that it has changed
            distributed.broadcast(fitted, src=0)
            buffer.copy_(fitted)
        if self.embedder is not None:  # the statistics scale it, so it comes after them
            empty = self.embedder.to(self.device).text([""])._asdict()
            self.stage.fit_null_text(cast(Batch, empty))

    def on_train_start(self) -> None:
        """Give a checkpoint's optimizer states the strides of their parameters.

        Fused optimizers walk memory in storage order, and a sharded run saves contiguous states.
        """
        for optimizer in self.trainer.optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if value.shape == parameter.shape and value.stride() != parameter.stride():
                        state[name] = torch.empty_like(parameter).copy_(value)

    def on_validation_start(self) -> None:
        """Unshard the stage: all ranks validate, and rank 0 samples, with full weights."""
        unshard(self.stage)

    def on_validation_end(self) -> None:
        """Leave this rank its shards."""
        reshard(self.stage)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the stage's loss and log its parts."""
        losses = self.stage.loss(batch)
        self.last_loss = losses["loss"].detach()
        if is_logged_step(self.trainer, self.global_step + 1):
            self._log_all("train", self._mean_over_ranks(losses), batch)
        return losses["loss"]

    def _mean_over_ranks(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """Average each loss over the ranks that have it; it is NaN on the others."""
        values = torch.stack([loss.detach() for loss in losses.values()])
        gathered = cast(Tensor, self.all_gather(values)).reshape(-1, len(losses))
        means = gathered.nanmean(0).tolist()
        return {name: mean for name, mean in zip(losses, means, strict=True) if mean == mean}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the stage's loss and the scores of `measure`."""
        values = {"loss": self.stage.loss(batch)["loss"], **self.measure(batch)}
        self._log_all("validation", values, batch)  # the same names on all ranks, or they hang

    def measure(self, batch: Batch) -> Scores:
        """Return mean scores of a validation batch, computed with the averaged weights."""
        return {}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Return rows of images `B 3 H W` in [-1, 1] that show the stage's output, or nothing."""
        return {}

    def _log_all(self, prefix: str, values: Mapping[str, Tensor | float], batch: Batch) -> None:
        self.log_dict(
            {f"{prefix}/{name}": value for name, value in values.items()},
            batch_size=cast(int, float(batch["valid"].sum())),  # Lightning rounds ints over ranks
            sync_dist=prefix == "validation",
        )

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the optimizer of the trainable weights and its schedule by steps."""
        optimizer: Any = self._optimizer(parameter_groups(self.stage))
        # A fused optimizer would unscale float16's gradients only after they have been clipped.
        optimizer._step_supports_amp_scaling = False
        max_steps = self.trainer.max_steps
        scheduler = LambdaLR(optimizer, lambda step: self._schedule(step, max_steps))
        schedule = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def gradient_norm(self) -> Tensor:
        """Return the norm of all ranks' current gradients, computed once per step."""
        if self._gradient_norm is None:
            gradients = [p.grad for p in self.stage.parameters() if p.grad is not None]
            self._gradient_norm = replicate(get_total_norm(gradients))
        return self._gradient_norm

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed noise and timesteps, and forget the gradient norm of the last step.

        The seed depends on the rank and on the number of batches since the run began, so a resumed
        run samples the same as an unbroken one without a saved generator state.
        """
        self._reseed(batches_started(self.trainer))
        self._gradient_norm = None

    def on_train_batch_end(self, *_: Any) -> None:
        """Validate after the last step, so that the exported stage has its scores."""
        if self.trainer.global_step == self.trainer.max_steps:
            validate_after_batch(self.trainer)

    def on_validation_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed from the index in the validation, so that losses are comparable over time."""
        self._reseed("validation", batch_idx)

    def _reseed(self, *parts: str | int) -> None:
        torch.manual_seed(seed_of(self.seed, self.name, *parts, self.global_rank))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the gradient norm and the learning rate."""
        if is_logged_step(self.trainer, self.global_step + 1):
            lr = optimizer.param_groups[0]["lr"]
            self.log_dict({"train/gradient_norm": self.gradient_norm(), "train/learning_rate": lr})

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, *_: Any, **__: Any
    ) -> None:
        """Clip by the norm that was computed for the guard and the log."""
        if gradient_clip_val:
            norm = self.gradient_norm()
            clip_grads_with_norm_(self.stage.parameters(), gradient_clip_val, norm)


class PriorModule(StageModule):
    """Train a prior; validate by the cosine of predicted and true image embeddings."""

    stage: PriorStage | AutoregressivePriorStage

    def measure(self, batch: Batch) -> Scores:
        """Return mean cosines to the true z_i: that of the prediction, "cosine", and its baselines.

        They are "cosine_text" (the caption's z_t), "cosine_shuffled" (the prediction from another
        caption) and "cosine_linear" (the closed-form linear prior, if the stage has it).
        """
        true, predicted = batch["image_embedding"], self.sample(batch)
        predictions = {
            "cosine": predicted,
            "cosine_text": batch["text_embedding"],
            "cosine_shuffled": predicted.roll(1, dims=0),
        }
        if self.stage.linear is not None:
            z_t = self.stage.text_scaling(batch["text_embedding"])
            predictions["cosine_linear"] = self.stage.linear(z_t)
        return {name: F.cosine_similarity(z, true).mean() for name, z in predictions.items()}


class AutoregressivePriorModule(PriorModule):
    """Train the autoregressive prior."""

    stage: AutoregressivePriorStage

    def measure(self, batch: Batch) -> Scores:
        """Return a prior's cosines and "cosine_codes", that of the quantized true z_i."""
        true = batch["image_embedding"]
        quantized = self.stage.decode(self.stage.encode(true))
        cosine = F.cosine_similarity(quantized, true).mean()
        return {**super().measure(batch), "cosine_codes": cosine}


class DecoderModule(StageModule):
    """Train the decoder; validate by the loss, and show samples next to the real images."""

    stage: DecoderStage

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Return real images and samples from their embeddings and captions."""
        return {"real": batch["image"], "decoded": self.sample(batch)}


class UpsamplerModule(StageModule):
    """Train an upsampler; validate by the PSNR, compared with bicubic upsampling."""

    stage: UpsamplerStage

    def measure(self, batch: Batch) -> Scores:
        """Return "psnr", "psnr_bicubic" and their difference "psnr_gain", in dB.

        All crops of the batch count as one image: bicubic upsampling is almost exact in a crop of
        plain background, and such crops would dominate a mean over crops.
        """
        images = (batch["image"], self.sample(batch), self.stage.enlarge(batch["low_res"]))
        true, *others = (rearrange(to_uint8(x), "b c h w -> 1 c (b h) w") for x in images)
        sampled, bicubic = (psnr(other, true)[0] for other in others)
        return {"psnr": sampled, "psnr_bicubic": bicubic, "psnr_gain": sampled - bicubic}

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Return bicubic upsampling, the upsampler's output and the real images."""
        bicubic = self.stage.enlarge(batch["low_res"])
        return {"bicubic": bicubic, "upsampled": self.sample(batch), "real": batch["image"]}


class ClipModule(StageModule):
    """Train a CLIP; validate by retrieval: find an image's caption, and a caption's image.

    A retrieval has `num_candidates` candidates, at most the validation's pairs.
    """

    stage: ClipStage

    def __init__(self, *args: Any, num_candidates: int = 64, **settings: Any):
        super().__init__(*args, **settings)
        self.num_candidates = num_candidates
        self._pairs: list[tuple[list[str], Tensor, Tensor]] = []

    def training_batches(self) -> Iterator[Batch]:
        """Yield training batches without images, to fit the vocabulary to their captions."""
        print(f"{self.name}: reading captions", file=sys.stderr, flush=True)
        yield from cast(Any, self.trainer).datamodule.caption_loader()

    def measure(self, batch: Batch) -> Scores:
        """Keep the batch's embeddings, in full precision, until the validation ends."""
        if batch["valid"].all():  # otherwise it is a batch of padding
            with torch.autocast(self.device.type, enabled=False):
                image, text, _ = self.stage.encode(batch)
            self._pairs.append((batch["key"], image.cpu(), text.cpu()))
        return {}

    def on_validation_epoch_end(self) -> None:
        """Log recall@1 and @5 in both directions, and the number of candidates.

        The candidates are the pairs of all ranks, sorted by key, as in one process.
        """
        gathered = gather_objects(self._pairs, self.trainer.world_size)
        keys, image, text = zip(*itertools.chain(*gathered), strict=True)
        keys = list(itertools.chain(*keys))
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self._pairs = []
        candidates = min(self.num_candidates, len(keys))
        recall = recall_at(torch.cat(image)[order], torch.cat(text)[order], (1, 5), candidates)
        scores = {**recall, "num_candidates": float(candidates)}
        self.log_dict({f"validation/{k}": v for k, v in scores.items()}, sync_dist=True)
