"""Ways between points of a latent space: along great circles, by weights, towards a text.

CLIP's embeddings lie on a sphere, and noise of many dimensions nearly does; a straight line between
two points of it leads through the inside, where no network has been trained.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_CLOSE = 1e-7  # of a unit vector, in float64: shorter, it has no direction
_MOST_ITERATIONS = 1000


def slerp(
    start: Float[Tensor, "*shape"], end: Float[Tensor, "*shape"], fraction: float
) -> Float[Tensor, "*shape"]:
    """The point at `fraction` of the great circle from one point to another.

    The angle to `start` grows linearly, and so does the length from that of `start` to that of
    `end`; points that are given normalised stay so. Each tensor is one point, whatever its shape.
    Between opposite points, where every way is as short, one is chosen that depends on `start`
    alone. At 0 and 1 the result is `start` and `end` to the bit, but for an end opposite to the
    start.

    Raises:
        ValueError: for a point without direction.
    """
    unit, length = _polar(start)
    other, other_length = _polar(end)
    point = _walk(unit, fraction * _way(unit, other))
    return (torch.lerp(length, other_length, fraction) * point).reshape(start.shape).to(start.dtype)


def blend(
    points: Float[Tensor, "count *shape"], weights: Sequence[float]
) -> Float[Tensor, "*shape"]:
    """The point of the sphere whose weighted squared angles to some points are smallest.

    Of two points it is `slerp`. (Buss & Fillmore 2001, algorithm A1; the lengths are averaged.)

    Raises:
        ValueError: for weights that are not one a point, none negative, one positive.
    """
    share = shares(weights, len(points))
    polar = [_polar(point) for point in points]
    length = sum(part * each for part, (_, each) in zip(share, polar, strict=True))
    units = torch.stack([unit for unit, _ in polar])
    mean = units[share.argmax()]
    for _ in range(_MOST_ITERATIONS):
        ways = torch.stack([_way(mean, unit) for unit in units])
        step = share.to(ways.device) @ ways
        mean = _walk(mean, step)
        if step.norm() < _CLOSE**2:
            break
    return (length * mean).reshape(points.shape[1:]).to(points.dtype)


def shares(weights: Sequence[float], count: int) -> Float[Tensor, " count"]:
    """Weights of `count` points, brought to a sum of 1.

    Raises:
        ValueError: for weights that are not one a point, none negative, one positive.
    """
    share = torch.as_tensor(weights, dtype=torch.float64)
    if share.shape != (count,) or (share < 0).any() or not 0 < share.sum() < float("inf"):
        raise ValueError(
            f"weights are {list(weights)}: give one for each of {count} points, "
            "none negative, and not all of them 0"
        )
    return share / share.sum()


def text_difference(
    target: Float[Tensor, " dim"], source: Float[Tensor, " dim"]
) -> Float[Tensor, " dim"]:
    """z_d = norm(z_t - z_t0), the direction from one text's embedding to another's (section 3.3).

    Raises:
        ValueError: if the two are the same.
    """
    difference = target.double() - source.double()
    if difference.norm() < _CLOSE * target.double().norm():
        raise ValueError("the two texts have the same embedding: there is no way from one to it")
    return (difference / difference.norm()).to(target.dtype)


def _polar(point: Tensor) -> tuple[Tensor, Tensor]:
    """Direction and length of a point, flat and in float64."""
    flat = point.double().flatten()
    length = flat.norm()
    if not 0 < length < float("inf"):
        raise ValueError("a latent is zero or not finite: it has no direction")
    return flat / length, length


def _way(start: Tensor, end: Tensor) -> Tensor:
    """The tangent at `start` that leads to `end`, as long as their angle."""
    cosine = start @ end
    across = end - cosine * start
    sine = across.norm()
    if sine < _CLOSE:
        if cosine > 0:
            return across
        across = torch.zeros_like(start)
        across[start.abs().argmin()] = 1
        across = across - (start @ across) * start
    return torch.atan2(sine, cosine) * across / across.norm()


def _walk(start: Tensor, way: Tensor) -> Tensor:
    """Where a tangent at `start` leads."""
    angle = way.norm()
    if angle == 0:
        return start
    point = torch.cos(angle) * start + torch.sin(angle) * way / angle
    return point / point.norm()
