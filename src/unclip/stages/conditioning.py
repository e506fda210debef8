"""Normalize embeddings, encode text, and drop conditions for classifier-free guidance."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from unclip.batch import Batch
from unclip.stages.base import Stage

Scaling = Literal["statistics", "paper", "none"]

# Appendix C: unit embeddings of d = 1024 are multiplied by 17.2, which is 0.5375 √d.
PAPER_SCALE = 17.2 / math.sqrt(1024)

STATISTICS_SAMPLES = 16_000  # of the training set: CLIP encodes them before the first step


class Normalizer(nn.Module):
    """(z - mean) / std, with constants saved with the weights.

    Args:
        dim: D, width of the embeddings.
        scaling: "statistics" fits mean and std per dimension to the training set (Karlo); "paper"
            multiplies by 0.5375 √D (appendix C); "none" is the identity.

    Raises:
        ValueError: the scaling is unknown.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, scaling: Scaling):
        super().__init__()
        scales = {"statistics": 1.0, "paper": PAPER_SCALE * dim**0.5, "none": 1.0}
        if scaling not in scales:
            raise ValueError(f"scaling is {scaling!r}; it can be {', '.join(scales)}")
        self.scaling = scaling
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.full((dim,), 1 / scales[scaling]))

    @torch.no_grad()
    def fit(self, embeddings: Float[Tensor, "count dim"]) -> None:
        """Fit mean and standard deviation to the data, if the scaling uses them."""
        if self.scaling == "statistics":
            self.mean.copy_(embeddings.mean(dim=0))
            self.std.copy_(embeddings.std(dim=0).clamp(min=1e-6))

    def forward(self, z: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Map embeddings from CLIP's space to the network's."""
        return (z - self.mean) / self.std

    def denormalize(self, z: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        """Map embeddings from the network's space to CLIP's."""
        return z * self.std + self.mean


def collect_embeddings(batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Return z_i and z_t of the first STATISTICS_SAMPLES samples, rounded up to whole batches."""
    z_i, z_t, count = [], [], 0
    for batch in batches:
        z_i.append(batch["image_embedding"])
        z_t.append(batch["text_embedding"])
        count += len(z_i[-1])
        if count >= STATISTICS_SAMPLES:
            break
    return torch.cat(z_i), torch.cat(z_t)


class NullText(nn.Module):
    """The null caption: the states of two tokens and an embedding.

    CLIP's empty caption has two tokens (start, end) whose states are constants, so the null text of
    a public model fits.

    Args:
        embedding_dim: D, width of the text embedding.
        text_width: width of the text states.
        learned: train the null caption; otherwise `fit` sets it.
    """

    TOKENS = 2

    def __init__(self, embedding_dim: int, text_width: int, *, learned: bool = True):
        super().__init__()
        self.learned = learned
        embedding, states = torch.zeros(1, embedding_dim), torch.zeros(1, self.TOKENS, text_width)
        if learned:
            self.embedding, self.states = nn.Parameter(embedding), nn.Parameter(states)
        else:
            self.register_buffer("embedding", embedding)
            self.register_buffer("states", states)

    @torch.no_grad()
    def fit(self, empty: dict[str, Tensor]) -> None:
        """Store the text tensors of the empty caption's condition."""
        self.states.copy_(empty["text_states"][:, : self.TOKENS])
        self.embedding.copy_(empty["text_embedding"])

    def like(self, text_mask: Bool[Tensor, "batch length"]) -> dict[str, Tensor]:
        """Return the text tensors of missing captions, in the shape of a batch's mask."""
        batch, length = text_mask.shape
        positions = torch.arange(length, device=self.states.device)
        mask = positions < self.TOKENS
        # F.pad would give the gradient strides that make DDP copy it.
        states = self.states.index_select(1, positions.clamp(max=self.TOKENS - 1))
        states = states.masked_fill(~mask[:, None], 0.0)
        return {
            "text_states": states.expand(batch, -1, -1),
            "text_mask": mask.expand(batch, -1),
            "text_embedding": self.embedding.expand(batch, -1),
        }


class CaptionStage(Stage):
    """A stage that is conditioned on captions, with guidance.

    Attributes:
        text_encoder: encoder of the tokens that is trained with the stage; None uses the frozen
            CLIP's states.
        text_scaling: normalization of z_t.
        null_text: the null caption.
        guidance_scale: guidance scale of sampling; 1 is no guidance.
    """

    needs_clip = True
    text_encoder: nn.Module | None
    text_scaling: Normalizer
    null_text: NullText
    guidance_scale: float

    def text(self, batch: Batch) -> dict[str, Tensor]:
        """Return the text states, their mask and the normalized text embedding of a batch."""
        if self.text_encoder is None:
            states = batch["text_states"]
        else:
            states = self.text_encoder(batch["tokens"], batch["text_mask"])
        return {
            "text_states": states,
            "text_mask": batch["text_mask"],
            "text_embedding": self.text_scaling(batch["text_embedding"]),
        }

    def fit_null_text(self, empty: Batch) -> None:
        """Store CLIP's empty caption as the null caption, unless the null is learned."""
        if not self.null_text.learned:
            self.null_text.fit(self.text(empty))


def drop(
    condition: dict[str, Tensor], null: dict[str, Tensor], probability: float
) -> dict[str, Tensor]:
    """Replace random rows of the tensors that `null` has; every parameter stays in the graph."""
    mask = condition["text_mask"]
    dropped = torch.rand(len(mask), device=mask.device) < probability
    out = dict(condition)
    for name, value in null.items():
        rows = dropped.reshape(-1, *([1] * (value.ndim - 1)))
        out[name] = torch.where(rows, value.to(condition[name].dtype), condition[name])
    return out
