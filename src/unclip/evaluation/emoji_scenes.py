"""Measure emoji scenes without a network: pairs of objects, and captions that leave things open.

Captions such as "a cat" or "a red heart" leave the background open and have many valid images. A
linear map gives one embedding for each, so only the decoder's noise can vary the images; a prior
should sample the variety.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from unclip.emoji import BACKGROUNDS, COLORS, Concept, concepts
from unclip.emoji.captions import article
from unclip.emoji.catalog import cells
from unclip.emoji.probes import concept_set
from unclip.emoji.templates import (
    Templates,
    background_names,
    everywhere,
    main_colors,
    pairs,
    verify_scenes,
)
from unclip.evaluation.choices import share
from unclip.evaluation.context import SPLITS, VALIDATION, Context
from unclip.evaluation.features import Features, Images, encode_images
from unclip.evaluation.generation import Sampling
from unclip.evaluation.measurement import Measurement, Numbers, Result, Table
from unclip.evaluation.sources import Real, read_real
from unclip.evaluation.stages import has_linear_map

SINGLES = 100  # training images loaded per concept
_SHARE = ("share", "error")
_SOURCES = {
    "generated": "the prior's z_i",
    "true_embedding": "the true z_i",
    "real": "(real images)",
}


class TwoObjects(Measurement):
    """Share of scenes whose colors and concepts are in the stated places.

    Images are decoded from the prior's and the true z_i; real images are the ceiling.
    """

    title = "Two recolored objects in a relation, by palettes and templates"
    stages = ("clip", "prior", "decoder")

    def __call__(self, context: Context) -> Result:
        templates, found = scene_templates(context), {}
        for split in SPLITS:
            real = context.real(split)
            shown = {"real": real}
            if split != VALIDATION:
                shown["generated"] = replace(real, images=context.generated(split))
                if rows := pairs(real.metadata):
                    taken = real.take(rows)
                    z = encode_images(context.embedder, taken.images)
                    images = context.sampling.decode(z, taken.captions)
                    shown["true_embedding"] = replace(taken, images=images)
            found[split] = {
                source: measure_scenes(scenes, templates) for source, scenes in shown.items()
            }
        parts = [(name, key) for name in ("colors", "concepts", "both") for key in _SHARE]
        parts += [("both", "n"), ("single", "share"), ("single", "n")]
        rows = [
            [words, split, *(shares.get(name, {}).get(key) for name, key in parts)]
            for split, sources in found.items()
            for source, words in _SOURCES.items()
            if (shares := sources.get(source))
        ]
        head = ["decoder from", "captions of", "colors in place", "±", "concepts in place", "±"]
        head += ["both in place", "±", "n pairs", "single concept right", "n single"]
        return Result(tables={self.title: Table(head, rows)}, values={"two_objects": found})


def read_singles(root: str | Path) -> Real:
    """Load 64 px training images of one object from a folder of emoji scenes."""
    if (name := concept_set(root)) is None:
        raise FileNotFoundError(f"{root} holds no emoji scenes")
    real = read_real(root, "train", 64, count=SINGLES * len(concepts(name)))
    return real.take([row for row, scene in enumerate(real.metadata) if len(scene["objects"]) == 1])


def scene_singles(context: Context) -> Real:
    """Return the context's training images of one object, loaded once."""
    return context.cached("singles", lambda: read_singles(context.data))


def scene_templates(context: Context) -> Templates:
    """Return the templates of the context's concepts, cut once."""
    singles, name = scene_singles(context), cast(str, concept_set(context.data))
    cut = Templates.cut
    return context.cached("templates", lambda: cut(singles.images, singles.metadata, name))


def measure_scenes(shown: Real, templates: Templates) -> dict[str, Numbers]:
    """Measure how many images show the objects that their metadata state.

    `colors`, `concepts` and `both` are shares of scenes with two recolored objects, `single` is the
    share of images of one object whose concept is right. A share without images is left out.
    """
    verified = verify_scenes(shown.images, shown.metadata, templates)
    return {name: share(right) for name, right in verified.items()}


class OpenCaptions(Measurement):
    """Spread of each prior's samples for captions that leave the background open."""

    captions: int = 12
    seeds: int = 8  # number of samples per caption

    title = "Captions that leave the background open"
    stages = ("clip", "prior", "decoder")

    def __call__(self, context: Context) -> Result:
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
    return [OpenCaption(one, None) for one in natural] + [OpenCaption(*one) for one in recolored]


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
    rows: dict[tuple[str, str | None], list[int]] = {}
    for row, scene in enumerate(singles.metadata):
        (item,) = scene["objects"]
        rows.setdefault((item["concept"], item["colour"]), []).append(row)
    groups = [rows.get((one.concept.hexcode, one.color), [])[:seeds] for one in captions]
    if not any(groups):
        raise FileNotFoundError("no training image of any open caption: prepare a larger data set")
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
