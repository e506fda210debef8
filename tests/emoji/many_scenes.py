"""Scenes of a set and split, for the tests of unclip.emoji."""

from unclip.emoji.scenes import Scene, scenes


def groups_of(name, split, count, *, seed=0) -> list[tuple[Scene, ...]]:
    """The first `count` scenes, each with its twins."""
    return [scenes(name, seed=seed, split=split, index=index) for index in range(count)]


def scenes_of(name, split, count, *, seed=0) -> list[Scene]:
    return [scene for group in groups_of(name, split, count, seed=seed) for scene in group]
