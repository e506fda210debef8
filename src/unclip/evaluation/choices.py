"""A CLIP's choices: is an image nearest to its own caption among several?"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from unclip.clip import ClipEmbedder
from unclip.emoji.probes import Probe

Numbers = dict[str, Any]

Z95 = 1.96


def encode_images(
    clip: ClipEmbedder, images: UInt8[Tensor, "count 3 height width"], batch_size: int = 64
) -> Float[Tensor, "count dim"]:
    """Return a CLIP's embeddings of images, on the CPU."""
    return torch.cat([clip.image(batch).cpu() for batch in images.split(batch_size)])


def encode_texts(
    clip: ClipEmbedder, texts: Sequence[str], batch_size: int = 64
) -> Float[Tensor, "count dim"]:
    """Return a CLIP's embeddings of texts, on the CPU."""
    starts = range(0, len(texts), batch_size)
    parts = [clip.text(texts[start : start + batch_size]) for start in starts]
    return torch.cat([part.text_embedding.cpu() for part in parts])


def choose(
    image_embedding: Float[Tensor, "count dim"],
    text_embedding: Float[Tensor, "count choices dim"] | Float[Tensor, "choices dim"],
    answer: Int[Tensor, " count"],
) -> Bool[Tensor, " count"]:
    """Return whether each image is nearer to its answer than to every other choice.

    A tie counts as wrong, so a CLIP that has collapsed to one point is never right.

    Args:
        image_embedding: one row per image.
        text_embedding: choices of each image, or one list for all images.
        answer: index of the right choice.
    """
    images, texts = image_embedding.double(), text_embedding.double()
    pattern = "nd,kd->nk" if texts.ndim == 2 else "nd,nkd->nk"
    scores = torch.einsum(pattern, images, texts)
    right = scores.gather(1, answer[:, None])  # (N, 1)
    return (right > scores).sum(dim=1) == scores.shape[1] - 1


def distractors(captions: Sequence[str], *, count: int, seed: int = 0) -> Int[Tensor, "rows count"]:
    """Return the indices of `count` other captions for each caption, all with different texts.

    Raises:
        ValueError: there are fewer than `count` + 1 different captions.
    """
    first = {caption: index for index, caption in reversed(list(enumerate(captions)))}
    texts = sorted(first)
    if len(texts) <= count:
        raise ValueError(
            f"{count} distractors need {count + 1} different captions, there are {len(texts)}"
        )
    rows = []
    for index, caption in enumerate(captions):
        sampled = random.Random(f"{seed}/{index}").sample(texts, count + 1)
        others = [text for text in sampled if text != caption][:count]
        rows.append([first[text] for text in others])
    return torch.tensor(rows, dtype=torch.int64).reshape(len(captions), count)


def judge_choices(
    judge: ClipEmbedder,
    images: UInt8[Tensor, "count 3 height width"],
    captions: Sequence[str],
    probes: Mapping[str, Probe],
    *,
    among: int = 16,
    seed: int = 0,
) -> dict[str, Numbers]:
    """Measure how often a judge chooses an image's own caption, and the answer to each probe.

    The distractors of a caption are other captions of the same list.
    """
    image_embedding = encode_images(judge, images)
    text_embedding = encode_texts(judge, captions)
    among = min(among, len(set(captions)))
    own = torch.arange(len(captions))[:, None]
    rows = torch.cat([own, distractors(captions, count=among - 1, seed=seed)], dim=1)
    first = torch.zeros(len(captions), dtype=torch.int64)
    right = choose(image_embedding, text_embedding[rows], first)
    shares = {"caption": {**share(right), "among": among}}
    return shares | probe_choices(judge, image_embedding, probes)


def probe_choices(
    clip: ClipEmbedder, image_embedding: Float[Tensor, "count dim"], probes: Mapping[str, Probe]
) -> dict[str, Numbers]:
    """Measure how often a CLIP is right on each probe that applies to at least one image.

    Args:
        clip: CLIP that embeds the choices.
        image_embedding: the same CLIP's embeddings of the images.
        probes: questions by name.
    """
    shares = {}
    for name, probe in probes.items():
        if not probe.rows:
            continue
        texts = sorted({text for choices in probe.choices for text in choices})
        index = {text: row for row, text in enumerate(texts)}
        indices = torch.tensor([[index[text] for text in choices] for choices in probe.choices])
        right = choose(
            image_embedding[probe.rows],
            encode_texts(clip, texts)[indices],
            torch.tensor(probe.answers),
        )
        shares[name] = {**share(right), "among": indices.shape[1]}
    return shares


def share(right: Bool[Tensor, " count"]) -> Numbers:
    """Return the share of right answers with its standard error and 95% interval."""
    value = float(right.double().mean())
    error = (value * (1 - value) / len(right)) ** 0.5
    interval = wilson(value, len(right))
    return {"share": value, "error": error, "interval": list(interval), "n": len(right)}


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson 1927), which is also valid at 0 and 1."""
    spread = Z95**2 / count
    center = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * (share * (1 - share) / count + spread / (4 * count)) ** 0.5
    return center - half, center + half
