"""Measure the spread of a prior's embeddings for captions that leave the background open.

Such captions ("a cat", "a red heart") have many valid images. A linear map gives one embedding for
each, so only the decoder's noise can vary the images; a prior should sample the variety.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from unclip.emoji import BACKGROUNDS, COLORS, Concept, concepts
from unclip.emoji.captions import article
from unclip.emoji.catalog import cells
from unclip.emoji.probes import concept_set
from unclip.emoji.templates import Templates, background_names, everywhere, main_colors
from unclip.evaluation.choices import share
from unclip.evaluation.context import Context
from unclip.evaluation.features import Features, Images
from unclip.evaluation.measurement import Measurement, Numbers, Result, Table
from unclip.evaluation.networks import encode_images
from unclip.evaluation.sampling import Sampling
from unclip.evaluation.sources import Real
from unclip.evaluation.stages import has_linear_map
from unclip.evaluation.two_objects import scene_singles, scene_templates


class OpenCaptions(Measurement):
    """Spread of each prior's samples for captions that leave the background open."""

    captions: int = 12
    seeds: int = 8  # number of samples per caption

    title = "Captions that leave the background open"
    stages = ("clip", "prior", "decoder")

    def __call__(self, context: Context) -> Result:
        """Measure every prior that the bundle has, and the data."""
        known, linear = context.cascade.metadata, has_linear_map(context.cascade)
        priors = {"diffusion": "prior" in known, "linear": linear, "ar": "prior_ar" in known}
        singles, name = scene_singles(context), cast(str, concept_set(context.data))
        found = measure_open(
            context.sampling,
            [prior for prior, available in priors.items() if available],
            choose_captions(name, self.captions, seed=context.seed),
            singles,
            scene_templates(context),
            seeds=self.seeds,
        )
        columns = {
            "embedding_spread": "cosine distance in a caption",
            "backgrounds": "different backgrounds",
            "right/share": "object right",
            "right/error": "±",
            "captions": "captions",
            "seeds": "seeds",
        }
        named = {"(real images)" if name == "data" else name: one for name, one in found.items()}
        table = Table.of("prior", named, columns)
        return Result(tables={self.title: table}, values={"open_captions": found})


class OpenCaption(NamedTuple):
    """A single object with or without a stated color, on any background."""

    concept: Concept
    color: str | None

    @property
    def text(self) -> str:
        """The caption, such as "a red heart"."""
        return article(f"{self.color} {self.concept.name}" if self.color else self.concept.name)

    @property
    def backgrounds(self) -> int:
        """Number of backgrounds in the data: all but the one of the object's color."""
        return len(BACKGROUNDS.keys() - {self.color or self.concept.color})


def choose_captions(name: str, count: int, *, seed: int = 0) -> list[OpenCaption]:
    """Choose at most `count` captions of set `name`: half in natural colors, half recolored."""
    rng = random.Random(f"{seed}/open captions/{name}")
    natural = rng.sample(concepts(name), min(count - count // 2, len(concepts(name))))
    seen = cells(name, held_out=False)
    recolored = rng.sample(seen, min(count - len(natural), len(seen)))
    return [
        *(OpenCaption(concept, None) for concept in natural),
        *map(OpenCaption._make, recolored),
    ]


def measure_open(
    sampling: Sampling,
    priors: Sequence[str],
    captions: Sequence[OpenCaption],
    singles: Real,
    templates: Templates,
    *,
    seeds: int,
) -> dict[str, Numbers]:
    """Measure each prior's spread over `seeds` samples of each caption, and the data's.

    `embedding_spread` is the mean cosine distance between two embeddings of one caption,
    `backgrounds` the mean number of different backgrounds among its images, and `right` the share
    of images whose concept and stated color the network-free probes find. The data have at most
    `seeds` real images of each caption; their number of backgrounds is the expectation of as many
    uniform samples.
    """
    groups = _real_rows(captions, singles, most=seeds)
    images = singles.images[[row for group in groups for row in group]]
    shown = [one for one, group in zip(captions, groups, strict=True) for _ in group]
    parts = encode_images(sampling.cascade.embedder, images).split(list(map(len, groups)))
    expected = [one.backgrounds * (1 - (1 - 1 / one.backgrounds) ** seeds) for one in captions]

    def numbers(parts: Sequence[Features], backgrounds: Sequence[float], right: Tensor) -> Numbers:
        return {
            "embedding_spread": _mean([_spread(part) for part in parts if len(part) > 1]),
            "backgrounds": _mean(backgrounds),
            "right": share(right),
            "captions": len(captions),
            "seeds": seeds,
        }

    found = {"data": numbers(parts, expected, _right(images, shown, templates))}
    repeated = [caption for caption in captions for _ in range(seeds)]
    texts = [caption.text for caption in repeated]
    for prior in priors:
        z = sampling.predict(texts, prior=prior)
        images = sampling.decode(z, texts)
        names = background_names(images)
        counts = [len(set(names[k : k + seeds])) for k in range(0, len(names), seeds)]
        found[prior] = numbers(z.split(seeds), counts, _right(images, repeated, templates))
    return found


def _real_rows(captions: Sequence[OpenCaption], singles: Real, *, most: int) -> list[list[int]]:
    """Return the rows of at most `most` real images of each caption."""
    rows: dict[tuple[str, str | None], list[int]] = {}
    for row, scene in enumerate(singles.metadata):
        (item,) = scene["objects"]
        rows.setdefault((item["concept"], item["colour"]), []).append(row)
    groups = [rows.get((one.concept.hexcode, one.color), [])[:most] for one in captions]
    if not any(groups):
        raise FileNotFoundError("no training image of any open caption: prepare a larger data set")
    return groups


def _spread(z: Features) -> float:
    """Return the mean cosine distance over all pairs of different rows."""
    z, count = F.normalize(z.double(), dim=1), len(z)
    return float((count**2 - z.sum(dim=0).square().sum()) / max(count * (count - 1), 1))


def _right(
    images: Images, captions: Sequence[OpenCaption], templates: Templates
) -> Bool[Tensor, " count"]:
    """Return whether each image shows its caption's concept in the stated color."""
    named = templates.name(images, everywhere(images))
    colors = [None if k < 0 else list(COLORS)[k] for k in main_colors(images, everywhere(images))]
    return torch.tensor(
        [
            code == caption.concept.hexcode and caption.color in (None, color)
            for caption, code, color in zip(captions, named, colors, strict=True)
        ]
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
