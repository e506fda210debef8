"""The distribution of training timesteps over the noise levels."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LogitNormal:
    """Density of σ(N(mean, std²)) on (0, 1) (Esser et al. 2024, section 3.1).

    Args:
        mean: location of the normal; positive values favor high noise.
        std: its standard deviation; small values concentrate the timesteps.
    """

    mean: float
    std: float

    def __post_init__(self):
        if self.std <= 0:
            raise ValueError(f"std of a logit-normal density is {self.std}; it must be positive")

    def quantile(self, u: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Map uniform fractions to this density by its inverse CDF."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
