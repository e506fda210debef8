"""Questions about emoji scenes for a judge CLIP, and prompts for a contact sheet."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unclip.emoji.captions import article
from unclip.emoji.catalog import COLORS, concepts
from unclip.emoji.prompts import Prompt, prompts
from unclip.files import read_json


class Probe(NamedTuple):
    """One kind of question, asked of the images that it applies to."""

    rows: list[int]  # index of each image
    # captions that each image's nearest is chosen from, the same number for each
    choices: list[list[str]]
    answers: list[int]  # index of the true caption among the choices

    def add(self, row: int, choices: list[str], answer: int = 0) -> None:
        """Ask the question of one more image."""
        self.rows.append(row)
        self.choices.append(choices)
        self.answers.append(answer)


def concept_set(root: str | Path) -> str | None:
    """Return the name of the concept set of a folder of emoji scenes, None for other data."""
    path = Path(root) / "dataset.json"
    if not path.is_file():
        return None
    return read_json(path).get("settings", {}).get("set")


def object_probes(metadata: Sequence[Mapping[str, Any]], name: str) -> dict[str, Probe]:
    """Return the questions about images of one object.

    `concept`: which concept of set `name` an object in its natural colors is ("an apple").
    `concept_recolored`: which concept a recolored object is, given its color ("a blue apple");
    without the color, a judge may rightly reject a blue apple. `color`: which color a recolored
    object has, given its concept. All held-out single objects are recolored.
    """
    known, colors = concepts(name), list(COLORS)
    index = {concept.hexcode: row for row, concept in enumerate(known)}
    probes = {kind: Probe([], [], []) for kind in ("concept", "concept_recolored", "color")}
    for row, scene in enumerate(metadata):
        if len(scene.get("objects", ())) != 1:
            continue
        (item,) = scene["objects"]
        color, answer = item["colour"], index[item["concept"]]
        if color is None:
            probes["concept"].add(row, [article(one.name) for one in known], answer)
            continue
        recolored = [article(f"{color} {one.name}") for one in known]
        probes["concept_recolored"].add(row, recolored, answer)
        painted = [article(f"{other} {item['name']}") for other in colors]
        probes["color"].add(row, painted, colors.index(color))
    return probes


def sheet_prompts(name: str, *, most: int = 18, seed: int = 0) -> dict[str, list[Prompt]]:
    """Return single-object prompts for a contact sheet, at most `most` of each kind.

    `natural`: objects in their own colors, one of each concept, evenly spaced if there are more.
    `seen`: objects in other colors that training contains. `held out`: in colors that it does not.
    """
    known = concepts(name)
    shown = (
        {known[place * len(known) // most] for place in range(most)} if len(known) > most else known
    )
    first: dict[str, dict[tuple[str, str | None], Prompt]] = {
        "natural": {},
        "seen": {},
        "held out": {},
    }
    for prompt in prompts(name, seed=seed):
        if prompt.color is None:
            kind, cell = "natural", (prompt.concept.hexcode, None)
        elif prompt.held_out:
            kind, cell = "held out", (prompt.concept.hexcode, prompt.color)
        else:
            kind, cell = "seen", (prompt.concept.hexcode, "any")
        if kind == "held out" or prompt.concept in shown:
            first[kind].setdefault(cell, prompt)
    return {kind: list(chosen.values())[:most] for kind, chosen in first.items()}
