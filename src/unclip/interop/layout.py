"""Which tensors of ours and of another library's hold the same numbers, and how they are arranged.

A component is described once, as a list of matches, and read and written by it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor


class Join(NamedTuple):
    """How tensors of theirs make one of ours, and the way back.

    Attributes:
        inward: theirs, in order, to ours.
        outward: ours to theirs.
    """

    inward: Callable[[list[Tensor]], Tensor]
    outward: Callable[[Tensor], list[Tensor]]


class Match(NamedTuple):
    """One tensor of ours and those of theirs that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    join: Join


SAME = Join(lambda parts: parts[0], lambda whole: [whole])
TRANSPOSED = Join(lambda parts: parts[0].T, lambda whole: [whole.T])
FROM_ROW = Join(lambda parts: parts[0].squeeze(0), lambda whole: [whole.unsqueeze(0)])
TO_ROW = Join(lambda parts: parts[0].unsqueeze(0), lambda whole: [whole.squeeze(0)])


def stacked(parts: int) -> Join:
    """Theirs are the equal parts of ours, one above the other."""
    return Join(torch.cat, lambda whole: list(whole.chunk(parts)))


def interleaved(count: int) -> Join:
    """Rows of theirs run (row, part), those of ours (part, row)."""
    return Join(
        lambda parts: rearrange(parts[0], "(row part) ... -> (part row) ...", part=count),
        lambda whole: [rearrange(whole, "(part row) ... -> (row part) ...", part=count)],
    )


def by_head(heads: int, count: int) -> Join:
    """Rows of theirs run (head, part, row), as OpenAI's attention has them; ours (part, head, row).

    Their weights may be those of a convolution over one position, with a last axis of one.
    """

    def inward(parts: list[Tensor]) -> Tensor:
        theirs = parts[0].flatten(1) if parts[0].ndim == 3 else parts[0]
        pattern = "(head part row) ... -> (part head row) ..."
        return rearrange(theirs, pattern, head=heads, part=count)

    def outward(whole: Tensor) -> list[Tensor]:
        pattern = "(part head row) ... -> (head part row) ..."
        return [rearrange(whole, pattern, head=heads, part=count)]

    return Join(inward, outward)


def convolved(join: Join) -> Join:
    """A join of which theirs is the weight of a convolution over one position."""
    return Join(join.inward, lambda whole: [part.unsqueeze(-1) for part in join.outward(whole)])


UNCONVOLVED = Join(lambda parts: parts[0].squeeze(-1), lambda whole: [whole.unsqueeze(-1)])


def affine(ours: str, *theirs: str, join: Join = SAME) -> list[Match]:
    """The weight and the bias of a layer."""
    return [
        Match(f"{ours}.{leaf}", tuple(f"{name}.{leaf}" for name in theirs), join)
        for leaf in ("weight", "bias")
    ]


def under(name: str, matches: Iterable[Match]) -> list[Match]:
    """Matches of a submodule's tensors, by the names that its parent has for them."""
    return [match._replace(ours=f"{name}.{match.ours}") for match in matches]


def read(
    theirs: Mapping[str, Tensor],
    matches: Iterable[Match],
    like: Mapping[str, Tensor],
    source: str,
) -> dict[str, Tensor]:
    """Their tensors as ours, in float32.

    Args:
        theirs: all that a file holds.
        matches: a match for each key of `like` that the file is to give.
        like: tensors of our shapes, on any device.
        source: the file, for errors.

    Raises:
        ValueError: naming their tensor that is missing, unknown, or of another shape.
    """
    matches = list(matches)
    wanted: dict[str, torch.Size] = {}
    for match in matches:
        parts = match.join.outward(like[match.ours])
        wanted.update((key, part.shape) for key, part in zip(match.theirs, parts, strict=True))
    for kind, keys in (
        ("lacks", wanted.keys() - theirs.keys()),
        ("has a tensor that unclip does not know:", theirs.keys() - wanted.keys()),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{source} {kind} {min(keys)}{more}")
    for key, shape in wanted.items():
        if theirs[key].shape != shape:
            raise ValueError(
                f"{source}: {key} has shape {list(theirs[key].shape)}, not {list(shape)}"
            )
    return {
        match.ours: match.join.inward([theirs[key] for key in match.theirs]).float()
        for match in matches
    }


def write(ours: Mapping[str, Tensor], matches: Iterable[Match]) -> dict[str, Tensor]:
    """Our tensors as theirs."""
    theirs: dict[str, Tensor] = {}
    for match in matches:
        parts = match.join.outward(ours[match.ours])
        theirs.update(
            (key, part.contiguous()) for key, part in zip(match.theirs, parts, strict=True)
        )
    return theirs
