"""A judge CLIP's choices: which of a few texts is nearest to a picture.

Arithmetic on embeddings, no model. Where texts tie the answer counts as wrong: a CLIP that
collapsed to one point must not look perfect.
"""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def choose(
    image_embedding: Float[Tensor, "count dim"],
    text_embedding: Float[Tensor, "count choices dim"] | Float[Tensor, "choices dim"],
    answer: Int[Tensor, " count"],
) -> Bool[Tensor, " count"]:
    """Whether each picture is nearer to its answer than to every other choice.

    Args:
        image_embedding: one row a picture.
        text_embedding: each picture's own choices, or one list for all pictures.
        answer: index of the right choice.
    """
    images, texts = image_embedding.double(), text_embedding.double()
    pattern = "nd,kd->nk" if texts.ndim == 2 else "nd,nkd->nk"
    scores = torch.einsum(pattern, images, texts)
    right = scores.gather(1, answer[:, None])  # (N, 1)
    return (right > scores).sum(dim=1) == scores.shape[1] - 1


def distractors(captions: Sequence[str], *, count: int, seed: int = 0) -> Int[Tensor, "rows count"]:
    """For each caption, the indices of `count` others: all different texts, none of them its own.

    Raises:
        ValueError: there are not `count` + 1 different captions.
    """
    first = {caption: index for index, caption in reversed(list(enumerate(captions)))}
    texts = sorted(first)
    if len(texts) <= count:
        raise ValueError(
            f"{count} distractors need {count + 1} different captions, there are {len(texts)}"
        )
    rows = []
    for index, caption in enumerate(captions):
        drawn = random.Random(f"{seed}/{index}").sample(texts, count + 1)
        others = [text for text in drawn if text != caption][:count]
        rows.append([first[text] for text in others])
    return torch.tensor(rows, dtype=torch.int64).reshape(len(captions), count)
