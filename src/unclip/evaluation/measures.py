"""What is measured of each stage, as plain numbers: embeddings and pictures in, a dict out.

Nothing here samples, loads or writes. Every dict says by itself how many pictures it rests on.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from unclip.clip import ClipEmbedder, recall_at
from unclip.evaluation.frechet import bootstrap_error, fit_gaussian, frechet_distance
from unclip.evaluation.judge import choose, distractors
from unclip.evaluation.real import Real
from unclip.evaluation.scores import Z95

Numbers = dict[str, Any]


class Probe(NamedTuple):
    """A question put to the judge, of those pictures that have an answer to it."""

    rows: list[int]  # which pictures
    choices: list[list[str]]  # the texts that each may be nearest to, equally many for all
    answers: list[int]  # the index of the right one

    def add(self, row: int, choices: list[str], answer: int) -> None:
        """Ask it of one more picture."""
        self.rows.append(row)
        self.choices.append(choices)
        self.answers.append(answer)


def embed_images(
    embedder: ClipEmbedder, images: UInt8[Tensor, "count 3 height width"], batch_size: int = 64
) -> Float[Tensor, "count dim"]:
    """A CLIP's embeddings of pictures, on the CPU."""
    return torch.cat([embedder.image(batch).cpu() for batch in images.split(batch_size)])


def embed_texts(
    embedder: ClipEmbedder, texts: Sequence[str], batch_size: int = 64
) -> Float[Tensor, "count dim"]:
    """A CLIP's embeddings of texts, on the CPU."""
    starts = range(0, len(texts), batch_size)
    parts = [embedder.text(texts[start : start + batch_size]) for start in starts]
    return torch.cat([part.text_embedding.cpu() for part in parts])


def clip_recall(embedder: ClipEmbedder, real: Real, *, among: int = 64) -> Numbers:
    """Retrieval recall at 1 and 5, from caption to picture and back.

    Of pictures with one and the same caption only the first takes part, since each would be a right
    answer to the others'. Where there are fewer than `among`, recall is among all of them.
    """
    first = {caption: row for row, caption in reversed(list(enumerate(real.captions)))}
    distinct = real.take(sorted(first.values()))
    among = min(among, len(distinct))
    recall = recall_at(
        embed_images(embedder, distinct.images),
        embed_texts(embedder, distinct.captions),
        among=among,
    )
    values = {name: float(value) for name, value in recall.items()}
    return {
        "recall_at_1": values["text_to_image_at_1"],
        "recall_at_5": values["text_to_image_at_5"],
        **{name: value for name, value in values.items() if name.startswith("image_to_text")},
        "among": among,
        "n": len(distinct) // among * among,
    }


def prior_cosines(
    predicted: Float[Tensor, "count dim"],
    true: Float[Tensor, "count dim"],
    text_embedding: Float[Tensor, "count dim"],
    captions: Sequence[str],
    *,
    linear: Float[Tensor, "count dim"] | None = None,
    among: int = 64,
    seed: int = 0,
) -> Numbers:
    """Mean cosines to the true image embedding z_i, and how well they retrieve it.

    `cosine` is the prediction's; `cosine_text` that of the caption's own z_t and `cosine_linear`
    that of a linear map's predictions, where they are given, both of which a prior has to beat;
    `cosine_shuffled` that of a prediction from another caption, which shows how much of the cosine
    all pictures share. `recall_at_1` is how often the true embedding is the nearest to the
    prediction among `among` others, `recall_text_at_1` how often it is the nearest to z_t; pictures
    with one and the same caption count once.
    """
    rows = {caption: row for row, caption in reversed(list(enumerate(captions)))}
    first = sorted(rows.values())
    among = min(among, len(first))
    recall = {
        name: recall_at(true[first], guess[first], k=(1,), among=among)["text_to_image_at_1"]
        for name, guess in (("recall_at_1", predicted), ("recall_text_at_1", text_embedding))
    }
    shuffled = predicted[distractors(captions, count=1, seed=seed)[:, 0]]
    compared = {
        "cosine": predicted,
        "cosine_text": text_embedding,
        "cosine_shuffled": shuffled,
        **({} if linear is None else {"cosine_linear": linear}),
    }
    return {
        **{name: float(F.cosine_similarity(z, true).mean()) for name, z in compared.items()},
        **{name: float(value) for name, value in recall.items()},
        "among": among,
        "n": len(captions),
    }


def frechet_distances(
    features: Mapping[str, Float[Tensor, "count features"]],
    reference: Float[Tensor, "count features"],
    *,
    resamples: int = 10,
    seed: int = 0,
) -> dict[str, Numbers]:
    """Each set's distance to one reference, with its bootstrap error; all at the same n.

    Raises:
        ValueError: the sets differ in size: their distances could not be compared.
    """
    if sizes := {len(rows) for rows in features.values()} - {len(reference)}:
        raise ValueError(
            f"distances at n={len(reference)} and n={min(sizes)} do not compare: take equally many"
        )
    target = fit_gaussian(reference)
    return {
        name: {
            "distance": frechet_distance(fit_gaussian(rows), target),
            "error": bootstrap_error(rows, reference, resamples=resamples, seed=seed),
        }
        for name, rows in features.items()
    }


def judge_choices(
    judge: ClipEmbedder,
    images: UInt8[Tensor, "count 3 height width"],
    captions: Sequence[str],
    probes: Mapping[str, Probe],
    *,
    among: int = 16,
    seed: int = 0,
) -> dict[str, Numbers]:
    """How often the judge picks a picture's own caption among some, and the answer to each probe.

    The distractors of a caption are other captions of the same list, all different in their words.
    A probe that no picture has an answer to is left out.
    """
    image_embedding = embed_images(judge, images)
    text_embedding = embed_texts(judge, captions)
    among = min(among, len(set(captions)))
    own = torch.arange(len(captions))[:, None]
    rows = torch.cat([own, distractors(captions, count=among - 1, seed=seed)], dim=1)
    first = torch.zeros(len(captions), dtype=torch.int64)
    right = choose(image_embedding, text_embedding[rows], first)
    return {"caption": {**share(right), "among": among}, **answers(judge, image_embedding, probes)}


def answers(
    clip: ClipEmbedder, image_embedding: Float[Tensor, "count dim"], probes: Mapping[str, Probe]
) -> dict[str, Numbers]:
    """Measure how often a CLIP is right on each probe that at least one image answers.

    Args:
        clip: embeds the choices.
        image_embedding: the same CLIP's embeddings of the images.
        probes: questions by name.
    """
    shares = {}
    for name, probe in probes.items():
        if not probe.rows:
            continue
        texts = sorted({text for choices in probe.choices for text in choices})
        place = {text: row for row, text in enumerate(texts)}
        indices = torch.tensor([[place[text] for text in choices] for choices in probe.choices])
        right = choose(
            image_embedding[probe.rows],
            embed_texts(clip, texts)[indices],
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
    """The 95% interval of a share (Wilson 1927), which holds also where it is 0 or 1."""
    spread = Z95**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * (share * (1 - share) / count + spread / (4 * count)) ** 0.5
    return middle - half, middle + half
