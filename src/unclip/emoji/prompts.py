"""Single-object prompts over a concept set, for contact sheets and probes."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from unclip.emoji.captions import single_caption
from unclip.emoji.catalogue import BACKGROUNDS, COLORS, Concept, concepts
from unclip.emoji.compositions import is_cell_held_out


class Prompt(NamedTuple):
    """A single-object prompt and what it asks for."""

    caption: str
    concept: Concept
    color: str | None  # None: as OpenMoji draws it
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
    """Single-object prompts, concept × color × background, for contact sheets and probes.

    They come in rounds: each round has one prompt of every concept, in the order of the table,
    with a color and a background drawn by `seed`. No background has its object's color.

    Args:
        name: the concept set, S, M or L.
        held_out: only cells that training saw (False) or did not see (True); None takes both.
        natural: also objects in their own colors ("an apple on a white background").
        backgrounds: the names of the backgrounds to use.
        count: how many prompts; None gives every one there is.
        seed: the order of colors and backgrounds.
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
