"""Scores of the race: the same measurements of each contender and of the real renders."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from unclip.cascade import Cascade
from unclip.contact_sheet import Tile, contact_sheet
from unclip.evaluation.emoji_probes import concept_set
from unclip.evaluation.features import EfficientNetLite0, extract
from unclip.evaluation.gallery import varied
from unclip.evaluation.measures import frechet_distances, judge_choices
from unclip.evaluation.networks import load_judge
from unclip.evaluation.parts import HELD_OUT, SEEN, VALIDATION
from unclip.evaluation.real import Real, read_real
from unclip.evaluation.report import table
from unclip.evaluation.two_objects import Templates, measure_scenes, read_singles

SHEET_ROWS = 12

Images = dict[str, Tensor]  # by split


def score(
    cascade: Cascade, images: dict[str, Images], real: dict[str, Real], root: Path
) -> dict[str, dict[str, Any]]:
    """Measure each contender's Fréchet distance, judge's choices and scenes of two objects."""
    reference = read_real(root, VALIDATION, 64, count=len(real[SEEN])).images
    network, judge = EfficientNetLite0(), load_judge(cascade.folder, cascade.embedder)
    count = min(len(real[SEEN]), len(reference))
    features = {name: extract(network, splits[SEEN][:count]) for name, splits in images.items()}
    distances = frechet_distances(features, extract(network, reference[:count]))
    known = concept_set(root)
    templates = None if known is None else Templates.cut(read_singles(root), known)
    scores: dict[str, dict[str, Any]] = {}
    for name, splits in images.items():
        scores[name] = {
            "fd_effnet_lite0": {**distances[name], "n": count},
            "judge": {
                split: judge_choices(judge, splits[split], real[split].captions, {})["caption"]
                for split in real
            },
            "two_objects": templates
            and {
                split: measure_scenes(replace(real[split], images=splits[split]), templates)
                for split in real
            },
        }
    return scores


def summary(results: dict[str, Any]) -> str:
    """Return the table that is printed."""
    rows = []
    for name, found in results["contenders"].items():
        distance, scenes = found["fd_effnet_lite0"], found["two_objects"] or {}
        parameters = found["parameters"] / 1e6 if "parameters" in found else None
        row = [name, parameters, *(found.get(key) for key in ("cpu_seconds", "steps"))]
        row += [distance["distance"], distance["error"], distance["n"]]
        for split in (SEEN, HELD_OUT):
            shares = found["judge"][split], scenes.get(split, {}).get("both", {})
            row += [share.get(key) for share in shares for key in ("share", "n")]
        rows.append([*row, found.get("evaluations")])
    head = ["decoder", "M parameters", "CPU s", "steps", "fd_effnet_lite0", "±", "n"]
    for split in ("seen", "held out"):
        head += [f"judge, {split}", "n", f"both objects, {split}", "n"]
    return table(rows, head=[*head, "evaluations"])


def sheet(images: dict[str, Images], real: dict[str, Real]) -> Image.Image:
    """Plot the images of all contenders for the same captions side by side."""
    tiles = []
    for split, shown in real.items():
        for row in varied(shown, SHEET_ROWS // 2):
            captions = {name: f"{name}: {shown.captions[row]}" for name in images}
            marked = split == HELD_OUT
            tiles += [Tile(images[k][split][row], captions[k], marked=marked) for k in images]
    title = "framed: held out"
    return contact_sheet(tiles, columns=len(images), size=128, title=title, lines=4)
