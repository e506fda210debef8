"""The contrastive loss of image–caption pairs, and retrieval recall."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int64
from open_clip.loss import gather_features
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
    images, texts, all_captions, first = image_embedding, text_embedding, captions, 0
    if gather:
        images, texts = gather_features(images, texts, local_loss=True, gather_with_grad=True)
        parts = [torch.empty_like(captions) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, captions)
        all_captions, first = torch.cat(parts), len(captions) * dist.get_rank()
    own = first + torch.arange(len(captions), device=captions.device)
    repeated = captions[:, None] == all_captions
    repeated = repeated.scatter(1, own[:, None], False)  # a caption stays its own positive
    pairs = (image_embedding, texts), (text_embedding, images)
    logits = [logit_scale * rows @ columns.T for rows, columns in pairs]
    logits = [part.masked_fill(repeated, float("-inf")) for part in logits]
    loss = (F.cross_entropy(logits[0], own) + F.cross_entropy(logits[1], own)) / 2
    return Contrast(loss, *((part.argmax(1) == own).float().mean() for part in logits))


def caption_ids(tokens: Int64[Tensor, "batch length"]) -> Int64[Tensor, " batch"]:
    """Return a number for each row of token ids, the same for equal rows.

    It is a random linear function modulo 2^64, so two different rows have the same number with a
    probability below 1e-14. `torch.unique` would make a GPU wait.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**63), 2**63 - 1, tokens.shape[1:], generator=generator)
    return (tokens * weights).sum(dim=1)


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
