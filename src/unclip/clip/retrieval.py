"""Retrieval recall: does an image find its caption among others, and a caption its image?"""

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
    """The share of rows whose partner is among the k nearest by cosine, in groups of `among`.

    Consecutive rows make a group, an incomplete last one is left out. Where others are exactly as
    near as the partner, the row counts with the probability that a random order puts the partner in
    the first k; embeddings that are all alike thus score k / among.

    Returns:
        `image_to_text_at_K` and `text_to_image_at_K` for each K of k, in [0, 1].

    Raises:
        ValueError: for fewer rows than one group takes.
    """
    count = len(image_embedding)
    if count < among:
        raise ValueError(
            f"{count} pairs make no group of {among}; give among={count} or more pairs"
        )
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
        level = (scores == own).sum(-1)  # the partner itself included
        for best in k:
            hit = ((best - nearer) / level).clamp(0, 1)
            recall[f"{name}_at_{best}"] = hit.to(torch.float64).mean().float()
    return recall
