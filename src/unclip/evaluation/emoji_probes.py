"""Questions about emoji scenes (which concept, which colour?) and prompts for a contact sheet."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unclip.data.emoji import COLOURS, Prompt, concepts, prompts
from unclip.data.emoji.captions import article
from unclip.evaluation.measures import Probe


def concept_set(root: str | Path) -> str | None:
    """The concept set of a folder of emoji scenes; None for any other data."""
    path = Path(root) / "dataset.json"
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get("settings", {}).get("set")


def probes(metadata: Sequence[dict[str, Any]], name: str) -> dict[str, Probe]:
    """What pictures of one object can be asked, given what each picture's json says.

    "concept": which of all concepts of set `name` it is ("an apple"). "colour": which of the
    colours, where the object was recoloured ("a red apple").
    """
    singles = {
        row: scene["objects"][0]
        for row, scene in enumerate(metadata)
        if len(scene.get("objects", ())) == 1
    }
    recoloured = {row: item for row, item in singles.items() if item["colour"] is not None}
    known, colours = concepts(name), list(COLOURS)
    names = [article(concept.name) for concept in known]
    places = {concept.hexcode: place for place, concept in enumerate(known)}
    return {
        "concept": Probe(
            rows=list(singles),
            choices=[names for _ in singles],
            answers=[places[item["concept"]] for item in singles.values()],
        ),
        "colour": Probe(
            rows=list(recoloured),
            choices=[
                [article(f"{colour} {item['name']}") for colour in colours]
                for item in recoloured.values()
            ],
            answers=[colours.index(item["colour"]) for item in recoloured.values()],
        ),
    }


def sheet_prompts(name: str, *, most: int = 18, seed: int = 0) -> dict[str, list[Prompt]]:
    """Single-object prompts for a contact sheet, at most `most` of a kind.

    "natural": objects in their own colours, one of each concept, evenly picked where there are
    more. "seen": in other colours, of the cells that training saw. "held out": of those that it did
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
        if prompt.colour is None:
            kind, cell = "natural", (prompt.concept.hexcode, None)
        elif prompt.held_out:
            kind, cell = "held out", (prompt.concept.hexcode, prompt.colour)
        else:
            kind, cell = "seen", (prompt.concept.hexcode, "any")
        if kind == "held out" or prompt.concept in shown:
            first[kind].setdefault(cell, prompt)
    return {kind: list(chosen.values())[:most] for kind, chosen in first.items()}
