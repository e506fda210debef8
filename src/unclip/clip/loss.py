"""open_clip's contrastive loss without repeated captions as negatives, and retrieval recall."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from open_clip.loss import ClipLoss
from torch import Tensor


class Contrast(NamedTuple):
    """The contrastive loss of a batch and its accuracy.

    Attributes:
        loss: differentiable loss.
        image_to_text: share of this process's images whose own caption has the highest score in
            the batch.
        text_to_image: share of this process's captions whose own image has the highest score.
    """

    loss: Float[Tensor, ""]
    image_to_text: Float[Tensor, ""]
    text_to_image: Float[Tensor, ""]


def contrastive_loss(
    image_embedding: Float[Tensor, "batch dim"],
    text_embedding: Float[Tensor, "batch dim"],
    logit_scale: Float[Tensor, ""],
    captions: Int64[Tensor, " batch"],
    *,
    gather: bool = False,
) -> Contrast:
    """Return the symmetric cross-entropy of Radford et al. (2021), figure 3.

    Args:
        image_embedding: image embeddings of unit length.
        text_embedding: text embeddings of unit length.
        logit_scale: factor on the cosines (not its logarithm).
        captions: `caption_ids`; rows with the same caption are not negatives.
        gather: also use the batches of the other processes, of equal size, as negatives. The mean
            of the gradients over processes is then that of the whole batch.
    """
    ranks = {}
    if gather:
        ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    loss = _PairLoss(captions, local_loss=gather, gather_with_grad=gather, **ranks)
    value = loss(image_embedding, text_embedding, logit_scale)
    own = loss.get_ground_truth(captions.device, len(captions))
    accuracies = [(logits.argmax(1) == own).float().mean() for logits in loss.logits]
    return Contrast(value, *accuracies)


def caption_ids(tokens: Int64[Tensor, "batch length"]) -> Int64[Tensor, " batch"]:
    """Return a number for each row of token ids, the same for equal rows.

    It is a random linear function modulo 2^64, so two different rows have the same number with a
    probability below 1e-14. `torch.unique` would make a GPU wait.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**63), 2**63 - 1, tokens.shape[1:], generator=generator)
    return (tokens * weights).sum(dim=1)


class _PairLoss(ClipLoss):
    """open_clip's loss without repeated captions among the negatives; it stores its logits."""

    def __init__(self, captions: Tensor, **keywords):
        super().__init__(**keywords)
        self.captions = captions
        self.logits: tuple[Tensor, ...] = ()

    def get_logits(self, *arguments, **keywords):
        repeated = self._repeated()
        logits = super().get_logits(*arguments, **keywords)
        logits = tuple(part.masked_fill(repeated, float("-inf")) for part in logits)
        self.logits = tuple(part.detach() for part in logits)
        return logits

    def _repeated(self) -> Bool[Tensor, "batch rows"]:
        """Return the mask of the other rows, of all processes, with the same caption."""
        captions = [self.captions]
        if self.world_size > 1:
            captions = [torch.empty_like(self.captions) for _ in range(self.world_size)]
            dist.all_gather(captions, self.captions)
        own = self.get_ground_truth(self.captions.device, len(self.captions))
        same = self.captions[:, None] == torch.cat(captions)
        return same.scatter(1, own[:, None], False)  # a caption stays its own positive


def recall_at(
    image_embedding: Float[Tensor, "count dim"],
    text_embedding: Float[Tensor, "count dim"],
    k: Sequence[int] = (1, 5),
    among: int = 64,
) -> dict[str, Float[Tensor, ""]]:
    """Return the share of rows whose partner is among the k nearest rows of its group by cosine.

    Consecutive rows form groups of `among`; an incomplete last group is left out. If other rows are
    exactly as near as the partner, the row counts with the probability that a random order puts the
    partner among the first k, so identical embeddings score k / among.

    Returns:
        `image_to_text_at_K` and `text_to_image_at_K` for each K in k, in [0, 1].

    Raises:
        ValueError: there are fewer rows than one group needs.
    """
    count = len(image_embedding)
    if count < among:
        raise ValueError(f"there are {count} pairs, fewer than a group of {among}: lower `among`")
    groups = count // among
    image = F.normalize(image_embedding[: groups * among].float(), dim=-1)
    text = F.normalize(text_embedding[: groups * among].float(), dim=-1)
    image, text = image.view(groups, among, -1), text.view(groups, among, -1)
    similarity = image @ text.transpose(1, 2)  # (G, N, N), row: image, column: text
    recall = {}
    for name, scores in (
        ("image_to_text", similarity),
        ("text_to_image", similarity.transpose(1, 2)),
    ):
        own = scores.diagonal(dim1=1, dim2=2)[..., None]  # (G, N, 1)
        nearer = (scores > own).sum(-1)
        tied = (scores == own).sum(-1)  # including the partner
        for K in k:
            hit = ((K - nearer) / tied).clamp(0, 1)
            recall[f"{name}_at_{K}"] = hit.to(torch.float64).mean().float()
    return recall
