"""Single-object prompts over a concept set, for contact sheets and probes."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from unclip.data.emoji.captions import single_caption
from unclip.data.emoji.catalogue import BACKGROUNDS, COLOURS, Concept, concepts
from unclip.data.emoji.compositions import is_cell_held_out


class Prompt(NamedTuple):
    """A single-object prompt and what it asks for."""

    caption: str
    concept: Concept
    colour: str | None  # None: as OpenMoji draws it
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
    """Single-object prompts, concept × colour × background, for contact sheets and probes.

    They come in rounds: each round has one prompt of every concept, in the order of the table,
    with a colour and a background drawn by `seed`. No background has its object's colour.

    Args:
        name: the concept set, S, M or L.
        held_out: only cells that training saw (False) or did not see (True); None takes both.
        natural: also objects in their own colours ("an apple on a white background").
        backgrounds: the names of the backgrounds to use.
        count: how many prompts; None gives every one there is.
        seed: the order of colours and backgrounds.
    """
    queues = []
    for concept in concepts(name):
        colours = [None] * natural + (list(COLOURS) if concept.families else [])
        queue = [
            Prompt(
                caption=single_caption(concept, colour, background),
                concept=concept,
                colour=colour,
                background=background,
                held_out=is_cell_held_out(concept, colour),
            )
            for colour in colours
            for background in backgrounds
            if background not in (colour, None if colour else concept.colour)
        ]
        queue = [prompt for prompt in queue if held_out in (None, prompt.held_out)]
        random.Random(f"{seed}/prompts/{concept.hexcode}").shuffle(queue)
        queues.append(queue)
    longest = max(map(len, queues))
    rounds = [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
    return rounds[:count]
