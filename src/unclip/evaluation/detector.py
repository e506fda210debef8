"""The detector that judges compositions: trained once for a concept set, kept beside a bundle."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from unclip.clip import fingerprint
from unclip.emoji import COLORS, concepts
from unclip.evaluation.detector_training import SIZE, Training, train_detector
from unclip.evaluation.features import resized
from unclip.evaluation.protocol import fingerprint as digest
from unclip.networks.detector import Detector, find_peaks

FORMAT = 1
THRESHOLD = 0.3  # GenEval's; an object is what the detector is this sure of


class Detection(NamedTuple):
    """One object that was found.

    Attributes:
        name: of its class.
        score: in [0, 1].
        box: left, upper, right and lower side in [0, 1].
        color: the nearest of those that objects can have.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    color: str


class EmojiDetector:
    """Finds a concept set's objects in pictures of any size; they are resized to 64 px.

    Args:
        network: trained.
        recipe: what it was trained by.
    """

    def __init__(self, network: Detector, recipe: Mapping[str, Any]) -> None:
        self.network = network
        self.recipe = dict(recipe)
        self.fingerprint = fingerprint(network.state_dict())
        self.names = tuple(concept.name for concept in concepts(recipe["set"]))

    @torch.no_grad()
    def __call__(
        self,
        images: UInt8[Tensor, "count 3 height width"],
        *,
        threshold: float = THRESHOLD,
        batch_size: int = 64,
    ) -> list[list[Detection]]:
        """Each picture's objects, the surest first."""
        found = []
        for batch in images.split(batch_size):
            peaks = find_peaks(self.network(resized(batch, SIZE) * 2 - 1))
            found += [
                [
                    Detection(self.names[label], score, tuple(box), list(COLORS)[color])
                    for score, label, box, color in zip(*rows, strict=True)
                    if score > threshold
                ]
                for rows in zip(*(part.tolist() for part in peaks), strict=True)
            ]
        return found


def recipe_of(concept_set: str, training: Training) -> dict[str, Any]:
    """What decides about a detector."""
    known = [concept.hexcode for concept in concepts(concept_set)]
    return {"set": concept_set, "concepts": known, **asdict(training)}


def detector_file(bundle: str | Path, concept_set: str, training: Training) -> Path:
    """Where a bundle keeps the detector of a recipe: one of another recipe has another name."""
    key = digest(recipe_of(concept_set, training))
    return Path(bundle) / "evaluation" / f"detector-{concept_set}-{key}.safetensors"


def load_or_train(
    bundle: str | Path, concept_set: str, training: Training, *, progress: bool = True
) -> EmojiDetector:
    """The detector that a bundle has; where that is missing, it is trained and kept there.

    Raises:
        ValueError: the file is damaged.
    """
    file = detector_file(bundle, concept_set, training)
    if file.is_file():
        return read_detector(file)
    with tqdm(
        total=training.steps, desc="detector", unit="step", leave=False, disable=not progress
    ) as bar:

        def show(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        network = train_detector(concept_set, training, progress=show)
    detector = EmojiDetector(network, recipe_of(concept_set, training))
    write_detector(file, detector)
    return detector


def write_detector(file: Path, detector: EmojiDetector) -> None:
    """Writes a detector as safetensors with its recipe: beside its place first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"unclip_detector": str(FORMAT), "recipe": json.dumps(detector.recipe)}
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        save_file(dict(detector.network.state_dict()), unfinished, metadata=metadata)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def read_detector(file: Path) -> EmojiDetector:
    """A detector that was written.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no detector, damaged, or of concepts that the set no longer has.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: `python src/evaluate.py metrics=limits` trains it"
        )
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        if metadata.get("unclip_detector") != str(FORMAT):
            raise ValueError("it is no detector of this unclip's")
        recipe = json.loads(metadata["recipe"])
        if recipe["concepts"] != [concept.hexcode for concept in concepts(recipe["set"])]:
            raise ValueError(f"it knows other concepts than the set {recipe['set']} now has")
        network = Detector(
            classes=len(concepts(recipe["set"])), colors=len(COLORS), width=recipe["width"]
        )
        network.load_state_dict(load_file(file))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): remove it, and it is made anew") from (
            error
        )
    return EmojiDetector(network.eval().requires_grad_(False), recipe)


def accuracy(found: Sequence[Sequence[Detection]], truth: Sequence[Mapping[str, Any]]) -> dict:
    """How right detections of real pictures are, given what each picture's json says.

    `found`: of the objects, how many a detection of their concept with an overlap of at least half
    stands for; `false`: detections beside these, for each object; `color`: of the found ones with
    a color of their own choice, how many were given it.
    """
    objects = hits = false = coloured = right = 0
    for detections, scene in zip(found, truth, strict=True):
        free = list(detections)
        for item in scene["objects"]:
            objects += 1
            match = next((one for one in free if _same(one, item)), None)
            if match is None:
                continue
            free.remove(match)
            hits += 1
            if item["colour"] is not None:
                coloured += 1
                right += match.color == item["colour"]
        false += len(free)
    return {
        "found": hits / max(objects, 1),
        "false": false / max(objects, 1),
        "colour": right / max(coloured, 1),
        "objects": objects,
        "pictures": len(truth),
    }


def _same(detection: Detection, item: Mapping[str, Any]) -> bool:
    """Whether it is the object: its concept, and at least half of both boxes shared."""
    x, y, width, height = item["box"]
    left, upper, right, lower = detection.box
    across = max(min(right, x + width) - max(left, x), 0)
    along = max(min(lower, y + height) - max(upper, y), 0)
    shared = across * along
    union = (right - left) * (lower - upper) + width * height - shared
    return detection.name == item["name"] and shared >= 0.5 * union
