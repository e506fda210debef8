"""Single-object prompts over a concept set, for contact sheets and probes."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from unclip.emoji.captions import single_caption
from unclip.emoji.catalog import BACKGROUNDS, COLORS, Concept, concepts
from unclip.emoji.compositions import is_cell_held_out


class Prompt(NamedTuple):
    """A single-object prompt with its concept, color and background."""

    caption: str
    concept: Concept
    color: str | None  # None: the colors of the drawing
    background: str
    held_out: bool


def prompts(
    name: str = "S",
    *,
    held_out: bool | None = None,
    natural: bool = True,
    backgrounds: Sequence[str] = tuple(BACKGROUNDS),
    count: int | None = None,
    seed: int = 0,
) -> list[Prompt]:
    """Return single-object prompts: concept × color × background.

    The prompts are in rounds. Each round has one prompt of every concept, in table order, with a
    random color and background. No background has the color of its object.

    Args:
        name: name of the concept set, S, M or L.
        held_out: whether to return only held-out cells (True), only others (False) or both (None).
        natural: whether to include objects without a color ("an apple on a white background").
        backgrounds: names of the backgrounds.
        count: maximum number of prompts; None returns all of them.
        seed: seed of the order of colors and backgrounds.
    """
    queues = []
    for concept in concepts(name):
        colors = [None] * natural + (list(COLORS) if concept.families else [])
        queue = [
            Prompt(
                caption=single_caption(concept, color, background),
                concept=concept,
                color=color,
                background=background,
                held_out=is_cell_held_out(concept, color),
            )
            for color in colors
            for background in backgrounds
            if background not in (color, None if color else concept.color)
        ]
        queue = [prompt for prompt in queue if held_out in (None, prompt.held_out)]
        random.Random(f"{seed}/prompts/{concept.hexcode}").shuffle(queue)
        queues.append(queue)
    longest = max(map(len, queues))
    rounds = [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
    return rounds[:count]
