"""Paths between points of a latent space: great circles, weighted means, text directions.

CLIP's embeddings are on a sphere, and noise of many dimensions nearly is. A straight line between
two of its points leads through the inside, where no network has been trained.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_EPSILON = 1e-7  # in float64: a difference of unit vectors that is shorter has no direction
_MAX_ITERATIONS = 1000


def slerp(
    start: Float[Tensor, "*shape"], end: Float[Tensor, "*shape"], fraction: float
) -> Float[Tensor, "*shape"]:
    """Return the point at `fraction` of the great circle from one point to another.

    The angle to `start` and the length change linearly. Each tensor is one point, whatever its
    shape. Between opposite points, where all paths are equally short, the path depends on `start`
    alone. At 0 and 1 the result equals `start` and `end` to the bit, except for an end opposite to
    the start. A point that is zero or not finite raises ValueError.
    """
    unit, length = normalize(start)
    end_unit, end_length = normalize(end)
    point = exp_map(unit, fraction * log_map(unit, end_unit))
    return (torch.lerp(length, end_length, fraction) * point).reshape(start.shape).to(start.dtype)


def spherical_mean(
    points: Float[Tensor, "count *shape"], weights: Sequence[float]
) -> Float[Tensor, "*shape"]:
    """Return the point of the sphere with the smallest weighted sum of squared angles to points.

    For two points this is `slerp`. Lengths are averaged (Buss & Fillmore 2001, algorithm A1). A
    point of two that has all the weight is kept to the bit.
    """
    weight = normalize_weights(weights, len(points))
    if len(points) == 2:
        return slerp(points[0], points[1], weight[1].item())
    normalized = [normalize(point) for point in points]
    length = sum(part * each for part, (_, each) in zip(weight, normalized, strict=True))
    units = torch.stack([unit for unit, _ in normalized])
    mean = units[weight.argmax()]
    for _ in range(_MAX_ITERATIONS):
        tangents = torch.stack([log_map(mean, unit) for unit in units])
        step = weight.to(tangents.device) @ tangents
        mean = exp_map(mean, step)
        if step.norm() < _EPSILON**2:
            break
    return (length * mean).reshape(points.shape[1:]).to(points.dtype)


def normalize_weights(weights: Sequence[float], count: int) -> Float[Tensor, " count"]:
    """Scale the weights of `count` points to a sum of 1; wrong ones raise ValueError."""
    weight = torch.as_tensor(weights, dtype=torch.float64)
    if weight.shape != (count,) or (weight < 0).any() or not 0 < weight.sum() < float("inf"):
        raise ValueError(
            f"weights are {list(weights)}: give one for each of {count} points, "
            "none negative, and not all of them 0"
        )
    return weight / weight.sum()


def evenly_spaced(frames: int) -> list[float]:
    """Return evenly spaced numbers from 0 to 1, both included; a single one is 1."""
    if frames < 1:
        raise ValueError(f"frames is {frames}; at least 1 is needed")
    return [1.0] if frames == 1 else [place / (frames - 1) for place in range(frames)]


def text_difference(
    target: Float[Tensor, " dim"], source: Float[Tensor, " dim"]
) -> Float[Tensor, " dim"]:
    """Return z_d = norm(z_t - z_t0), the direction between two text embeddings (section 3.3).

    Equal embeddings raise ValueError.
    """
    difference = target.double() - source.double()
    if difference.norm() < _EPSILON * target.double().norm():
        raise ValueError("the two texts have the same embedding: they define no direction")
    return (difference / difference.norm()).to(target.dtype)


def normalize(point: Tensor) -> tuple[Tensor, Tensor]:
    """Return the direction of a point, flat and in float64, and its length."""
    flat = point.double().flatten()
    length = flat.norm()
    if not 0 < length < float("inf"):
        raise ValueError("a latent is zero or not finite: it has no direction")
    return flat / length, length


def log_map(start: Tensor, end: Tensor) -> Tensor:
    """Return the tangent at `start` that points to `end` and is as long as their angle."""
    cosine = start @ end
    tangent = end - cosine * start
    sine = tangent.norm()
    if sine < _EPSILON:
        if cosine > 0:
            return tangent
        tangent = torch.zeros_like(start)
        tangent[start.abs().argmin()] = 1
        tangent = tangent - (start @ tangent) * start
    return torch.atan2(sine, cosine) * tangent / tangent.norm()


def exp_map(start: Tensor, tangent: Tensor) -> Tensor:
    """Return the point that a tangent at `start` leads to along a great circle."""
    angle = tangent.norm()
    if angle == 0:
        return start
    point = torch.cos(angle) * start + torch.sin(angle) * tangent / angle
    return point / point.norm()
