"""A CLIP's choices: is an image nearest to its own caption among several?"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unclip.clip import ClipEmbedder
from unclip.emoji.probes import Probe, concept_set, counterfactual_probes, object_probes
from unclip.evaluation.context import HELD_OUT, SEEN, Context
from unclip.evaluation.features import Features, Images, encode_images, encode_texts
from unclip.evaluation.measurement import Z95, Measurement, Numbers, Result, Table
from unclip.evaluation.sources import Real

MEASURABLE = 0.9  # least share of real images on which a judge must be right
_PROBES = {
    "caption": "own caption",
    "concept": "concept",
    "concept_recolored": "concept, recolored",
    "color": "color, recolored",
    "count": "count",
    "pair_places": "places of a pair",
    "pair_colors": "colors of a pair",
    "pair_concept": "a concept of a pair",
}


class JudgeChoices(Measurement):
    """How often a judge CLIP chooses the true caption of a generated image among false ones.

    Binding, counting and position are the choices among counterfactual captions. The same share
    for real images is the ceiling; below 90% the judge cannot measure that category.
    """

    among: int = 16  # number of captions of other images that an image's own caption is chosen from

    title = "The judge's choices"
    stages = ("clip", "prior", "decoder", "judge")

    def __call__(self, context: Context) -> Result:
        found, options = {}, {"among": self.among, "seed": context.seed}
        for split in context.splits(SEEN, HELD_OUT):
            real = context.real(split)
            asked = real.captions, scene_probes(context, real)
            found[split] = {
                "generated": judge_choices(
                    context.judge, context.generated(split), *asked, **options
                ),
                "real": judge_choices(context.judge, real.images, *asked, **options),
            }
        return Result(tables={self.title: _table(found)}, values={"judge": found})


def scene_probes(context: Context, real: Real) -> dict[str, Probe]:
    """Return the questions about emoji scenes; none for other data."""
    if (name := concept_set(context.data)) is None:
        return {}
    objects = object_probes(real.metadata, name)
    return objects | counterfactual_probes(real.captions, real.metadata, name)


def choice_rows(choices: Mapping[str, Mapping[str, Numbers]]) -> list[list[Any]]:
    """Return a table row per probe: its name, number of choices, and share and n of each split."""
    rows = []
    for name, words in _PROBES.items():
        shares = [of_split.get(name, {}) for of_split in choices.values()]
        if among := {share["among"] for share in shares if share}:
            numbers = [share.get(key) for share in shares for key in ("share", "n")]
            rows.append([words, *among, *numbers])
    return rows


def _table(found: Mapping[str, Mapping[str, Mapping[str, Numbers]]]) -> Table:
    """Return the shares of generated images next to those of real images, their ceiling."""
    rows = []
    for name, words in _PROBES.items():
        for split, sources in found.items():
            if (ours := sources["generated"].get(name)) is None:
                continue
            real = sources["real"][name]["share"]
            ratio = ours["share"] / real if real else None
            note = "" if real >= MEASURABLE else "not measurable with this judge"
            numbers = [ours["share"], ours["error"], real, ratio, ours["n"]]
            rows.append([words, ours["among"], split, *numbers, note])
    head = ["judge chooses the", "among", "captions of", "generated", "±", "real"]
    return Table([*head, "generated / real", "n", "note"], rows)


def choose(
    image_embedding: Features,
    text_embedding: Float[Tensor, "count choices dim"],
    answer: Int[Tensor, " count"],
) -> Bool[Tensor, " count"]:
    """Return whether each image is nearer to the text at `answer` than to its other choices.

    A tie counts as wrong, so a CLIP that has collapsed to one point is never right.
    """
    scores = torch.einsum("nd,nkd->nk", image_embedding.double(), text_embedding.double())
    right = scores.gather(1, answer[:, None])  # (N, 1)
    return (right > scores).sum(dim=1) == scores.shape[1] - 1


def choose_own(
    image_embedding: Features,
    text_embedding: Features,
    captions: Sequence[str],
    *,
    among: int,
    seed: int,
) -> Bool[Tensor, " count"]:
    """Return whether each image is nearest to its own caption among `among` of the captions."""
    own = torch.arange(len(captions))[:, None]
    rows = torch.cat([own, distractors(captions, count=among - 1, seed=seed)], dim=1)
    batches = zip(image_embedding.split(256), rows.split(256), strict=True)
    right = [choose(z, text_embedding[row], torch.zeros_like(row[:, 0])) for z, row in batches]
    return torch.cat(right)


def first_rows(captions: Sequence[str]) -> dict[str, int]:
    """Return the first row of each different caption."""
    return {caption: row for row, caption in reversed(list(enumerate(captions)))}


def distractors(captions: Sequence[str], *, count: int, seed: int = 0) -> Int[Tensor, "rows count"]:
    """Return the indices of `count` other captions for each caption, all with different texts."""
    first = first_rows(captions)
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
    images: Images,
    captions: Sequence[str],
    probes: Mapping[str, Probe],
    *,
    among: int = 16,
    seed: int = 0,
) -> dict[str, Numbers]:
    """Measure how often a judge chooses an image's own caption, and the answer to each probe.

    The distractors of a caption are other captions of the same list.
    """
    among = min(among, len(set(captions)))
    z, texts = encode_images(judge, images), encode_texts(judge, captions)
    right = choose_own(z, texts, captions, among=among, seed=seed)
    return {"caption": {**share(right), "among": among}} | probe_choices(judge, z, probes)


def probe_choices(
    clip: ClipEmbedder, image_embedding: Features, probes: Mapping[str, Probe]
) -> dict[str, Numbers]:
    """Measure how often a CLIP is right on each probe that applies to at least one image.

    The images are given by the same CLIP's embeddings.
    """
    shares = {}
    for name, probe in probes.items():
        if not probe.rows:
            continue
        texts = sorted({text for choices in probe.choices for text in choices})
        index = {text: row for row, text in enumerate(texts)}
        indices = torch.tensor([[index[text] for text in choices] for choices in probe.choices])
        embedded, answers = encode_texts(clip, texts)[indices], torch.tensor(probe.answers)
        right = choose(image_embedding[probe.rows], embedded, answers)
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
