"""Measure scenes of two recolored objects by palettes and templates, without a network."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from unclip.emoji import concepts
from unclip.emoji.probes import concept_set
from unclip.emoji.templates import Templates, pairs, verify_scenes
from unclip.evaluation.choices import Numbers, encode_images, share
from unclip.evaluation.context import SPLITS, VALIDATION, Context
from unclip.evaluation.measurement import Measurement, Result, Table
from unclip.evaluation.sources import Real, read_real

SINGLES = 100  # training images loaded per concept
_SOURCES = {
    "generated": "the prior's z_i",
    "true_embedding": "the true z_i",
    "real": "(real images)",
}


@dataclass(frozen=True, kw_only=True)
class TwoObjects(Measurement):
    """Share of scenes whose colors and concepts are in the stated places."""

    title: ClassVar[str] = "Two recolored objects in a relation, by palettes and templates"
    stages: ClassVar[tuple[str, ...]] = ("clip", "prior", "decoder")

    def __call__(self, context: Context) -> Result:
        """Measure images from the prior's and the true z_i; real images are the ceiling."""
        templates, found = scene_templates(context), {}
        for split in SPLITS:
            real = context.real(split)
            shown = {"real": real}
            if split != VALIDATION:
                shown["generated"] = replace(real, images=context.generated(split))
                if rows := pairs(real.metadata):
                    shown["true_embedding"] = _reconstructed(context, real.take(rows))
            found[split] = {
                source: measure_scenes(scenes, templates) for source, scenes in shown.items()
            }
        return Result(tables={self.title: _table(found)}, values={"two_objects": found})


def read_singles(root: str | Path) -> Real:
    """Load 64 px training images of one object from a folder of emoji scenes.

    Raises:
        FileNotFoundError: the folder has no emoji scenes.
    """
    if (name := concept_set(root)) is None:
        raise FileNotFoundError(f"{root} holds no emoji scenes")
    real = read_real(root, "train", 64, count=SINGLES * len(concepts(name)))
    return real.take([row for row, scene in enumerate(real.metadata) if len(scene["objects"]) == 1])


def scene_singles(context: Context) -> Real:
    """Return the context's training images of one object, loaded once."""
    return context.cached("singles", lambda: read_singles(context.data))


def scene_templates(context: Context) -> Templates:
    """Return the templates of the context's concepts, cut once."""

    def cut() -> Templates:
        singles = scene_singles(context)
        return Templates.cut(singles.images, singles.metadata, concept_set(context.data))

    return context.cached("templates", cut)


def measure_scenes(shown: Real, templates: Templates) -> dict[str, Numbers]:
    """Measure how many images show the objects that their metadata state.

    `colors`, `concepts` and `both` are shares of scenes with two recolored objects, `single` is the
    share of images of one object whose concept is right. A share without images is left out.
    """
    verified = verify_scenes(shown.images, shown.metadata, templates)
    return {name: share(right) for name, right in verified.items()}


def _reconstructed(context: Context, real: Real) -> Real:
    """Return the decoder's images of the true embeddings."""
    z = encode_images(context.embedder, real.images)
    return replace(real, images=context.sampling.decode(z, real.captions))


def _table(found: Mapping[str, Mapping[str, Mapping[str, Numbers]]]) -> Table:
    rows = []
    for split, sources in found.items():
        for source, words in _SOURCES.items():
            if not (shares := sources.get(source)):
                continue
            row = [words, split]
            for name in ("colors", "concepts", "both"):
                row += [shares.get(name, {}).get(key) for key in ("share", "error")]
            row.append(shares.get("both", {}).get("n"))
            rows.append(row + [shares.get("single", {}).get(key) for key in ("share", "n")])
    head = ["decoder from", "captions of", "colors in place", "±", "concepts in place", "±"]
    head += ["both in place", "±", "n pairs", "single concept right", "n single"]
    return Table(head, rows)
