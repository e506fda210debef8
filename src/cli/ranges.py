"""Allowed ranges of numbers, in configurations and on plain command lines."""

import argparse
import math
import re
from collections.abc import Callable
from typing import Any

SEEDS = (0, 2**63 - 1)
_BELOW_1, _ABOVE_0 = math.nextafter(1, 0), math.nextafter(0, 1)

# The smallest and the largest value, by the end of a key; the first that fits counts.
_RANGES = (
    (r"seed", *SEEDS),
    (r"(lr|muon_lr|eps|\w*weight_decay|gradient_clip_val|text_encoder\.layers)", 0, math.inf),
    (r"(workers|num_sanity_val_steps|warm_up_steps|decay_steps|shuffle_buffer)", 0, math.inf),
    (r"(\w*levels|limit_\w+|overfit_batches)", 0, math.inf),
    (r"(betas|momentum)", 0, _BELOW_1),
    (r"(decay|dropout|drop_\w+|final|clean_share|max_bad_fraction|top_p|eta)", 0, 1),
    (r"(\w+_multiplier|\w+_minutes|\w+_gib|std|huber|clip_range|flops)", _ABOVE_0, math.inf),
    (r"(\w*guidance\w*|scales|strength|mean)", -math.inf, math.inf),
    (r"(batch_size|every_steps|count)", 1, math.inf),
    (r"(clip|counts|data|measure|network|protocol|sampler|steps\w*|trainer)\..+", 1, math.inf),
    (r"model\.(image_size|text_width|scale|candidates|num_\w+|text_encoder\..+)", 1, math.inf),
    (r"diffusion\.timesteps", 1, math.inf),
)


def check_ranges(config: Any, key: str = "") -> None:
    """Raise ValueError with key, value and range if a number in a configuration is out of range."""
    if isinstance(config, dict):
        for name, value in config.items():
            check_ranges(value, f"{key}.{name}".lstrip("."))
    elif isinstance(config, list):
        for value in config:
            check_ranges(value, key)
    elif isinstance(config, int | float) and not isinstance(config, bool):
        fits = (r for pattern, *r in _RANGES if re.fullmatch(rf"(.+\.)?{pattern}", key))
        low, high = next(fits, (-math.inf, math.inf))
        if not low <= config <= high or math.isinf(config):
            raise ValueError(f"{key}={config}: it must be {_describe(config, low, high)}")


def number(
    kind: type[int] | type[float], low: float = -math.inf, high: float = math.inf
) -> Callable[[str], float]:
    """Return a type for argparse: a finite number within a range."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan if kind is float else low - 1
        if not low <= value <= high or math.isinf(value):
            name = "an integer" if kind is int else "a number"
            about = _describe(value, low, high)
            raise argparse.ArgumentTypeError(f"{text!r}: expected {name}, {about}")
        return value

    return parse


def _describe(value: float, low: float, high: float) -> str:
    """Describe the range that a value is not in."""
    if high == math.inf:
        finite = low > -math.inf and math.isfinite(value)
        return ("above 0" if low == _ABOVE_0 else f"at least {low}") if finite else "finite"
    return f"from {low} to {high}" if high != _BELOW_1 else "at least 0 and below 1"
