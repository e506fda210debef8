"""Maps with a closed form, fitted where others are trained."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

CHUNK = 4096  # rows of targets that are held in float64 at a time


@torch.no_grad()
def ridge_regression(
    inputs: Float[Tensor, "count dim"], targets: Float[Tensor, "count outputs"], ridge: float
) -> Float[Tensor, "dim+1 outputs"]:
    """The weights that predict `targets` from [inputs, 1], from the normal equations in float64.

    Args:
        inputs: of about unit variance.
        targets: what is predicted.
        ridge: added to the diagonal of the inputs' second moments, in samples; the bias, the last
            row, is not shrunk.
    """
    inputs = F.pad(inputs, (0, 1), value=1.0).double()
    penalty = torch.full((inputs.shape[1],), ridge, dtype=torch.float64, device=inputs.device)
    penalty[-1] = 0
    gram = inputs.T @ inputs + penalty.diag()
    parts = zip(inputs.split(CHUNK), targets.split(CHUNK), strict=True)
    moments = sum(rows.T @ wanted.double() for rows, wanted in parts)
    return torch.linalg.solve(gram, moments).to(targets.dtype)


class LinearPrior(nn.Module):
    """One linear layer from z_t to z_i, which Kandinsky's ablation found hard for a prior to beat.

    It gives the mean of what a caption may stand for, where a prior draws from it.

    Args:
        dim: D.
        normalise: make predictions unit vectors.
        ridge: as `ridge_regression` takes it.
    """

    def __init__(self, dim: int, *, normalise: bool, ridge: float = 10.0):
        super().__init__()
        self.normalise, self.ridge = normalise, ridge
        self.register_buffer("weight", torch.zeros(dim + 1, dim))

    def fit(
        self,
        text_embedding: Float[Tensor, "count dim"],
        image_embedding: Float[Tensor, "count dim"],
    ) -> None:
        """Fits the map to pairs, z_t standardised."""
        self.weight.copy_(ridge_regression(text_embedding, image_embedding, self.ridge))

    def forward(self, text_embedding: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """The image embedding that is to be expected of a standardised z_t, in CLIP's space."""
        z = F.pad(text_embedding, (0, 1), value=1.0) @ self.weight
        return F.normalize(z, dim=-1) if self.normalise else z
