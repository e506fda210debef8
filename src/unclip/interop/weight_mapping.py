"""Rename and rearrange the tensors of another library into those of our networks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from unclip.recipes import check_names

# The names in folders of diffusers' components, and those in Karlo's own checkpoints.
Style = Literal["diffusers", "karlo"]
STYLES: tuple[Style, Style] = ("diffusers", "karlo")
Join = Callable[..., Tensor]


def transpose(matrix: Tensor) -> Tensor:
    """Transpose a matrix."""
    return matrix.T


def concatenate(*tensors: Tensor) -> Tensor:
    """Concatenate the rows of one tensor or more."""
    return torch.cat(tensors)


def interleaved(tensor: Tensor, *, count: int) -> Tensor:
    """Reorder rows from (row, part), as in Karlo, to (part, row), with `count` parts."""
    return rearrange(tensor, "(row part) ... -> (part row) ...", part=count)


def by_head(tensor: Tensor, *, heads: int, count: int) -> Tensor:
    """Reorder rows from (head, part, row), as in OpenAI's attention, to (part, head, row).

    The `count` parts are queries, keys and values, or only keys and values.
    """
    return rearrange(tensor, "(h part row) ... -> (part h row) ...", h=heads, part=count)


class Match(NamedTuple):
    """A tensor of ours and the tensors of theirs that make it.

    Attributes:
        ours: name of our tensor.
        theirs: names of their tensors, the arguments of `join`.
        join: function from their tensors to ours.
    """

    ours: str
    theirs: tuple[str, ...]
    join: Join = concatenate


def affine(ours: str, *theirs: str, join: Join = concatenate) -> list[Match]:
    """Match the weight and the bias of a layer."""
    return [
        Match(f"{ours}.{leaf}", tuple(f"{name}.{leaf}" for name in theirs), join)
        for leaf in ("weight", "bias")
    ]


def layers(
    names: Mapping[str, tuple[str, str]], style: Style, ours: str = "", theirs: str = ""
) -> list[Match]:
    """Match the layers of a table {ours: (diffusers', Karlo's)}, with prefixes of their names."""
    column = STYLES.index(style)
    pairs = [(f"{ours}{leaf}", f"{theirs}{pair[column]}") for leaf, pair in names.items()]
    return [match for pair in pairs for match in affine(*pair)]


def projections(
    ours: str, separate: Sequence[str], joint: str, style: Style, heads: int
) -> list[Match]:
    """Match an attention's projections: separate layers in diffusers, grouped by head in Karlo."""
    if style == "diffusers":
        return affine(ours, *separate)
    return affine(ours, joint, join=partial(by_head, heads=heads, count=len(separate)))


def under(name: str, matches: Iterable[Match]) -> list[Match]:
    """Prefix our names with the name of a submodule."""
    return [match._replace(ours=f"{name}.{match.ours}") for match in matches]


def convert_tensors(
    theirs: Mapping[str, Tensor],
    matches: Sequence[Match],
    expected: Mapping[str, Tensor],
    source: Path,
) -> dict[str, Tensor]:
    """Convert their tensors to ours, in float32; dimensions of size one are added or removed.

    Args:
        theirs: all tensors of their component.
        matches: one match for each of our tensors that the component contains.
        expected: tensors of our shapes, on any device.
        source: their file, named in errors.

    Raises:
        ValueError: naming their tensor that is missing, unexpected, or of another shape.
    """
    check_names(source, {key for match in matches for key in match.theirs}, theirs.keys())
    converted = {}
    for match in matches:
        tensors, shape = [theirs[key] for key in match.theirs], expected[match.ours].shape
        try:
            joined = match.join(*tensors)
        except RuntimeError:  # the shapes do not even fit the join
            joined = None
        if joined is None or _without_ones(joined.shape) != _without_ones(shape):
            pairs = zip(match.theirs, tensors, strict=True)
            given = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in pairs)
            raise ValueError(f"{source}: {given} does not fit unclip's {match.ours} {list(shape)}")
        converted[match.ours] = joined.reshape(shape).float()
    return converted


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]
