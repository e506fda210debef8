"""Captions of scenes: five each, in simple English."""

import random

from unclip.emoji.scenes import Item, Scene

NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": "to the left of", "above": "above"}
INVERSES = {"left of": "to the right of", "above": "below"}
# First words that start with a vowel letter but a consonant sound, and the reverse.
_TAKES_A = ("uni", "eu", "one", "use", "ukulele")
_TAKES_AN = ("hour", "heir", "honest", "x-ray")


def article(words: str) -> str:
    """Return `words` with "a" or "an" in front."""
    first = words.lower()
    vowel = first[0] in "aeiou" and not first.startswith(_TAKES_A)
    return f"{'an' if vowel or first.startswith(_TAKES_AN) else 'a'} {words}"


def full_caption(name: str, color: str | None, background: str) -> str:
    """Return the full caption of one object: "a red apple on a blue background"."""
    return f"{article(f'{color} {name}' if color else name)} {_on(background)}"


def captions(scene: Scene, *, seed: int) -> list[str]:
    """Return five captions of a scene: full, short, reworded, reversed, "an emoji of …".

    Every caption of a pair states its relation, so no caption also fits the twin.
    """
    generator = random.Random(f"{seed}/captions/{scene.key}/{scene.kind}")
    if scene.relation is not None:
        return _pair_captions(scene, scene.relation, generator)
    item, on = scene.items[0], _on(scene.background)
    if len(scene.items) > 1:
        thing = f"{NUMBERS[len(scene.items)]} {item.concept.plural}"
        reworded = generator.choice([f"a picture of {thing}", f"a group of {thing} {on}"])
    else:
        thing, other = _noun_phrase(item), _noun_phrase(item, alias=True)
        if item.color is None and item.concept.color:
            named = _noun_phrase(item._replace(color=item.concept.color))
            other = generator.choice([other, named]) if other != thing else named
        reworded = f"{other} {on}" if other != thing else f"a picture of {thing}"
    return [
        f"{thing} {on}",
        thing,
        reworded,
        f"{article(scene.background)} background with {thing}",
        generator.choice([f"an emoji of {thing}", f"an emoji of {thing} {on}"]),
    ]


def _pair_captions(scene: Scene, name: str, generator: random.Random) -> list[str]:
    on = _on(scene.background)
    relation, inverse = RELATIONS[name], INVERSES[name]
    first, second = (_noun_phrase(item) for item in scene.items)
    others = f" {relation} ".join(_noun_phrase(item, alias=True) for item in scene.items)
    same = others == f"{first} {relation} {second}"
    return [
        f"{first} {relation} {second} {on}",
        f"{first} {name} {second}",
        f"a picture of {first} {relation} {second}" if same else f"{others} {on}",
        f"{second} {inverse} {first} {on}",
        generator.choice(
            [f"an emoji of {first} {relation} {second}", f"an emoji of {second} {inverse} {first}"]
        ),
    ]


def _noun_phrase(item: Item, *, alias: bool = False) -> str:
    name = item.concept.alias if alias and item.concept.alias else item.concept.name
    return article(f"{item.color} {name}" if item.color else name)


def _on(background: str) -> str:
    return f"on {article(background)} background"
