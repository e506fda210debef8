"""Retrieval recall between images and captions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


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
