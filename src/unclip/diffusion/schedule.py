"""Noise schedules and the timesteps that a sampler visits, in float64."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor


def cosine_alpha_bar(timesteps: int, max_beta: float = 0.999) -> Float64[Tensor, " timesteps"]:
    """ᾱ_t of the cosine schedule (Nichol & Dhariwal 2021, eq. 17), each β capped at `max_beta`."""

    def alpha_bar(fraction: float) -> float:
        return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [
        min(1 - alpha_bar((t + 1) / timesteps) / alpha_bar(t / timesteps), max_beta)
        for t in range(timesteps)
    ]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), dim=0)


def linear_alpha_bar(timesteps: int) -> Float64[Tensor, " timesteps"]:
    """ᾱ_t of the linear schedule (Ho et al. 2020): β from 1e-4 to 0.02 at 1000 steps."""
    scale = 1000 / timesteps
    betas = torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "cosine": cosine_alpha_bar,
    "linear": linear_alpha_bar,
}


def zero_terminal_snr(alpha_bar: Float64[Tensor, " timesteps"]) -> Float64[Tensor, " timesteps"]:
    """√ᾱ shifted and scaled so that the last is 0 and the first stays (Lin et al. 2024, alg. 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


def log_snr(alpha_bar: Tensor) -> Tensor:
    """Log ᾱ / (1 - ᾱ), which is -∞ at pure noise."""
    return torch.log(alpha_bar) - torch.log1p(-alpha_bar)


def _descending(timesteps: list[int]) -> list[int]:
    """The list without what does not go down."""
    kept = timesteps[:1]
    for t in timesteps[1:]:
        if t < kept[-1]:
            kept.append(t)
    return kept


def linear_spacing(alpha_bar: Tensor, steps: int) -> list[int]:
    """Evenly from T-1 down to 0, both included, each rounded to the nearest step."""
    last = len(alpha_bar) - 1
    if steps == 1:
        return [last]
    return _descending([round(last * (1 - k / (steps - 1))) for k in range(steps)])


def trailing_spacing(alpha_bar: Tensor, steps: int) -> list[int]:
    """Evenly from T-1 down, the last above 0 (Lin et al. 2024, table 2)."""
    total = len(alpha_bar)
    return _descending([max(round(total * (1 - k / steps)) - 1, 0) for k in range(steps)])


def leading_spacing(alpha_bar: Tensor, steps: int) -> list[int]:
    """Every ⌊T / steps⌋-th from 0 up, read downwards: ADM's and GLIDE's "ddimN".

    The first of them lies up to a stride below T-1.
    """
    stride = len(alpha_bar) // steps
    return [k * stride for k in reversed(range(steps))]


def _nearest(alpha_bar: Tensor, targets: Tensor) -> list[int]:
    """T-1, and then the timesteps whose log-SNR is nearest to all but the first of `targets`."""
    distance = (log_snr(alpha_bar)[None, :] - targets[:, None]).abs()
    return _descending([len(alpha_bar) - 1, *distance.argmin(dim=1).tolist()[1:]])


def _log_snr_range(alpha_bar: Tensor, lowest: float, highest: float) -> tuple[float, float]:
    """The schedule's log-SNR at pure noise and at the image, cut off where nothing happens."""
    ends = log_snr(alpha_bar[[-1, 0]])
    return max(ends[0].item(), lowest), min(ends[1].item(), highest)


def log_snr_spacing(
    alpha_bar: Tensor, steps: int, lowest: float = -7.0, highest: float = 7.0
) -> list[int]:
    """Evenly in log signal-to-noise ratio, which spends steps where a solver errs (Lu et al. 2022).

    The ends of a schedule, where log-SNR runs away and nothing happens, are cut off at `lowest` and
    `highest`; the first timestep is T-1 all the same, since sampling starts from pure noise.
    """
    low, high = _log_snr_range(alpha_bar, lowest, highest)
    return _nearest(alpha_bar, torch.linspace(low, high, steps, dtype=alpha_bar.dtype))


def karras_spacing(
    alpha_bar: Tensor, steps: int, rho: float = 7.0, lowest: float = -9.0, highest: float = 9.0
) -> list[int]:
    """Evenly in σ^(1/ρ), σ the noise beside a signal of 1 (Karras et al. 2022, eq. 5)."""
    low, high = _log_snr_range(alpha_bar, lowest, highest)
    ends = [math.exp(-0.5 * end / rho) for end in (low, high)]
    sigma = torch.linspace(*ends, steps, dtype=alpha_bar.dtype) ** rho
    return _nearest(alpha_bar, -2 * sigma.log())


SPACINGS: dict[str, Callable[[Tensor, int], list[int]]] = {
    "linear": linear_spacing,
    "trailing": trailing_spacing,
    "leading": leading_spacing,
    "log_snr": log_snr_spacing,
    "karras": karras_spacing,
}


def sectioned_spacing(alpha_bar: Tensor, counts: Sequence[int]) -> list[int]:
    """`counts` timesteps, evenly, from each of as many equal sections of [0, T), noise last.

    GLIDE's "10,10,3,2,2" spends twenty of 27 steps on the half that is nearest to the image.

    Raises:
        ValueError: if a section is asked for more timesteps than it has.
    """
    timesteps, start = [], 0
    size, longer = divmod(len(alpha_bar), len(counts))
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if not 1 <= count <= length:
            raise ValueError(f"a section of {length} timesteps cannot give {count}")
        stride = (length - 1) / max(count - 1, 1)
        timesteps += [start + round(k * stride) for k in range(count)]
        start += length
    return timesteps[::-1]
