"""Scores of the race: the same measurements of each decoder and of the real renders."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from results import markdown
from torch import Tensor

from unclip.bundle import load_embedder, stage_file
from unclip.cascade import Cascade
from unclip.contact_sheet import Tile, contact_sheet
from unclip.emoji.probes import concept_set
from unclip.emoji.templates import Templates
from unclip.evaluation.choices import judge_choices
from unclip.evaluation.context import HELD_OUT, SEEN, VALIDATION
from unclip.evaluation.emoji_scenes import measure_scenes, read_singles
from unclip.evaluation.features import EfficientNetLite0, extract
from unclip.evaluation.image_stages import frechet_distances
from unclip.evaluation.sources import Real, read_real
from unclip.evaluation.stages import varied

SHEET_ROWS = 12

Images = dict[str, Tensor]  # by split
Scores = dict[str, Any]


def score(
    cascade: Cascade, images: dict[str, Images], real: dict[str, Real], root: Path
) -> dict[str, Scores]:
    """Measure each decoder's Fréchet distance, judge's choices and scenes of two objects."""
    reference = read_real(root, VALIDATION, 64, count=len(real[SEEN])).images
    network, judge = EfficientNetLite0(), load_embedder(stage_file(cascade.folder, "judge"))
    count = min(len(real[SEEN]), len(reference))
    features = {name: extract(network, splits[SEEN][:count]) for name, splits in images.items()}
    distances = frechet_distances(features, extract(network, reference[:count]))
    templates = None
    if known := concept_set(root):
        singles = read_singles(root)
        templates = Templates.cut(singles.images, singles.metadata, known)
    scores: dict[str, Scores] = {}
    for name, splits in images.items():
        distance = {**distances[name], "n": count}
        scores[name] = found = {"fd_effnet_lite0": distance, "judge": {}, "two_objects": {}}
        for split, shown in real.items():
            choices = judge_choices(judge, splits[split], shown.captions, {})
            found["judge"][split] = choices["caption"]
            if templates is not None:
                generated = replace(shown, images=splits[split])
                found["two_objects"][split] = measure_scenes(generated, templates)
    return scores


def summary(contenders: dict[str, Scores]) -> str:
    """Format the scores as a table."""
    rows = []
    for name, found in contenders.items():
        keys = ("parameters", "cpu_seconds", "steps", "evaluations")
        row = {"decoder": name} | {key: found.get(key) for key in keys}
        row |= {f"FD {key}": found["fd_effnet_lite0"][key] for key in ("distance", "error", "n")}
        for split, words in ((SEEN, "seen"), (HELD_OUT, "held out")):
            shares = {"judge": found["judge"][split]}
            shares["both objects"] = found["two_objects"].get(split, {}).get("both", {})
            for key, share in shares.items():
                row |= {f"{key}, {words}": share.get("share"), f"n {key}, {words}": share.get("n")}
        rows.append(row)
    return markdown(rows)


def sheet(images: dict[str, Images], real: dict[str, Real]) -> Image.Image:
    """Plot the images of all decoders for the same captions side by side."""
    tiles = []
    for split, shown in real.items():
        for row in varied(shown, SHEET_ROWS // 2):
            captions = {name: f"{name}: {shown.captions[row]}" for name in images}
            marked = split == HELD_OUT
            tiles += [Tile(images[k][split][row], captions[k], marked=marked) for k in images]
    return contact_sheet(tiles, columns=len(images), title="framed: held out", lines=4)
