"""Rename and rearrange the tensors of another library into those of our networks."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from unclip.recipes import check_names

# The names in folders of diffusers' components, and those in Karlo's own checkpoints.
Style = Literal["diffusers", "karlo"]
Join = Callable[..., Tensor]


def same(tensor: Tensor) -> Tensor:
    """Return a tensor as it is."""
    return tensor


def transpose(matrix: Tensor) -> Tensor:
    """Transpose a matrix."""
    return matrix.T


def stack(*tensors: Tensor) -> Tensor:
    """Concatenate the rows of tensors of one shape."""
    return torch.stack(tensors).flatten(0, 1)


def interleaved(tensor: Tensor, *, count: int) -> Tensor:
    """Reorder rows from (row, part), as in Karlo, to (part, row), with `count` parts."""
    return rearrange(tensor, "(row part) ... -> (part row) ...", part=count)


def by_head(tensor: Tensor, *, heads: int, count: int) -> Tensor:
    """Reorder rows from (head, part, row), as in OpenAI's attention, to (part, head, row).

    Args:
        tensor: weight or bias of a linear layer, or the weight of a 1D convolution of length one.
        heads: number of attention heads.
        count: number of parts: three for queries, keys and values, two for keys and values.
    """
    matrix = tensor.flatten(1) if tensor.ndim == 3 else tensor
    return rearrange(matrix, "(h part row) ... -> (part h row) ...", h=heads, part=count)


first_row = partial(torch.squeeze, dim=0)
as_row = partial(torch.unsqueeze, dim=0)
convolution_to_linear = partial(torch.squeeze, dim=-1)


class Match(NamedTuple):
    """A tensor of ours and the tensors of theirs that make it.

    Attributes:
        ours: name of our tensor.
        theirs: names of their tensors, the arguments of `join`.
        join: function from their tensors to ours.
    """

    ours: str
    theirs: tuple[str, ...]
    join: Join = same


def affine(ours: str, *theirs: str, join: Join = same) -> list[Match]:
    """Match the weight and the bias of a layer."""
    return [
        Match(f"{ours}.{leaf}", tuple(f"{name}.{leaf}" for name in theirs), join)
        for leaf in ("weight", "bias")
    ]


def under(name: str, matches: Iterable[Match]) -> list[Match]:
    """Prefix our names with the name of a submodule."""
    return [match._replace(ours=f"{name}.{match.ours}") for match in matches]


def convert_tensors(
    theirs: Mapping[str, Tensor],
    matches: Iterable[Match],
    expected: Mapping[str, Tensor],
    source: Path,
) -> dict[str, Tensor]:
    """Convert their tensors to ours, in float32.

    Args:
        theirs: all tensors of their component.
        matches: one match for each of our tensors that the component contains.
        expected: tensors of our shapes, on any device.
        source: their file, named in errors.

    Raises:
        ValueError: naming their tensor that is missing, unexpected, or of another shape.
    """
    matches = list(matches)
    check_names(source, {key for match in matches for key in match.theirs}, theirs.keys())
    return {
        match.ours: _joined(match, [theirs[key] for key in match.theirs], expected, source)
        for match in matches
    }


def _joined(
    match: Match, tensors: list[Tensor], expected: Mapping[str, Tensor], source: Path
) -> Tensor:
    shape = expected[match.ours].shape
    try:
        joined = match.join(*tensors)
    except RuntimeError:  # the shapes do not even fit the join
        joined = None
    if joined is None or joined.shape != shape:
        given = ", ".join(
            f"{k} {list(t.shape)}" for k, t in zip(match.theirs, tensors, strict=True)
        )
        raise ValueError(f"{source}: {given} does not fit unclip's {match.ours} {list(shape)}")
    return joined.float()
