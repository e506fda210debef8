"""Measure scenes of two recolored objects by palettes and templates, without a network."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from unclip.emoji import concepts
from unclip.emoji.probes import concept_set
from unclip.emoji.templates import Templates, pairs, verify_scenes
from unclip.evaluation.choices import share
from unclip.evaluation.context import SPLITS, VALIDATION, Context
from unclip.evaluation.measurement import Measurement, Numbers, Result, Table
from unclip.evaluation.networks import encode_images
from unclip.evaluation.sources import Real, read_real

SINGLES = 100  # training images loaded per concept
_SOURCES = {
    "generated": "the prior's z_i",
    "true_embedding": "the true z_i",
    "real": "(real images)",
}


class TwoObjects(Measurement):
    """Share of scenes whose colors and concepts are in the stated places."""

    title = "Two recolored objects in a relation, by palettes and templates"
    stages = ("clip", "prior", "decoder")

    def __call__(self, context: Context) -> Result:
        """Measure images from the prior's and the true z_i; real images are the ceiling."""
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
        return Result(tables={self.title: _table(found)}, values={"two_objects": found})


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


def _table(found: Mapping[str, Mapping[str, Mapping[str, Numbers]]]) -> Table:
    """Return a row for each source of each split."""
    parts = [(name, key) for name in ("colors", "concepts", "both") for key in ("share", "error")]
    parts += [("both", "n"), ("single", "share"), ("single", "n")]
    rows = [
        [words, split, *(shares.get(name, {}).get(key) for name, key in parts)]
        for split, sources in found.items()
        for source, words in _SOURCES.items()
        if (shares := sources.get(source))
    ]
    head = ["decoder from", "captions of", "colors in place", "±", "concepts in place", "±"]
    head += ["both in place", "±", "n pairs", "single concept right", "n single"]
    return Table(head, rows)
