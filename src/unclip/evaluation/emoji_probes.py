"""Questions about emoji scenes (which concept, which color?) and prompts for a contact sheet."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unclip.emoji import COLORS, Prompt, concepts, prompts
from unclip.emoji.captions import article
from unclip.evaluation.measures import Probe


def concept_set(root: str | Path) -> str | None:
    """The concept set of a folder of emoji scenes; None for any other data."""
    path = Path(root) / "dataset.json"
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get("settings", {}).get("set")


def probes(metadata: Sequence[dict[str, Any]], name: str) -> dict[str, Probe]:
    """What pictures of one object can be asked, given what each picture's json says.

    "concept": which of all concepts of set `name` an object in its own colors is ("an apple").
    "concept_recoloured": which one a recoloured object is, its color being told ("a blue apple");
    asked as the former, a judge may rightly know apples to be red. "colour": which of the colors a
    recoloured object has, its concept being told. All held-out single objects are recoloured.
    """
    known, colors = concepts(name), list(COLORS)
    places = {concept.hexcode: place for place, concept in enumerate(known)}
    asked = {kind: Probe([], [], []) for kind in ("concept", "concept_recoloured", "colour")}
    for row, scene in enumerate(metadata):
        if len(scene.get("objects", ())) != 1:
            continue
        (item,) = scene["objects"]
        color, place = item["colour"], places[item["concept"]]
        names = [_noun(color, concept.name) for concept in known]
        asked["concept" if color is None else "concept_recoloured"].add(row, names, place)
        if color is not None:
            paints = [_noun(other, item["name"]) for other in colors]
            asked["colour"].add(row, paints, colors.index(color))
    return asked


def _noun(color: str | None, name: str) -> str:
    return article(name if color is None else f"{color} {name}")


def sheet_prompts(name: str, *, most: int = 18, seed: int = 0) -> dict[str, list[Prompt]]:
    """Single-object prompts for a contact sheet, at most `most` of a kind.

    "natural": objects in their own colors, one of each concept, evenly picked where there are
    more. "seen": in other colors, of the cells that training saw. "held out": of those that it did
    not, as many as there is room for.
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
