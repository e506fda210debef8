"""The closed-form linear prior (ridge regression)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

CHUNK = 4096  # rows of targets converted to float64 at a time


@torch.no_grad()
def ridge_regression(
    inputs: Float[Tensor, "count dim"], targets: Float[Tensor, "count outputs"], ridge: float
) -> Float[Tensor, "dim+1 outputs"]:
    """Return the weights that predict `targets` from [inputs, 1] (normal equations, float64).

    Args:
        inputs: inputs of about unit variance.
        targets: outputs to predict.
        ridge: penalty on the squared weights, in samples; the bias, which is the last row of the
            weights, is not penalized.
    """
    inputs = F.pad(inputs, (0, 1), value=1.0).double()
    penalty = torch.full((inputs.shape[1],), ridge, dtype=torch.float64, device=inputs.device)
    penalty[-1] = 0
    gram = inputs.T @ inputs + penalty.diag()
    parts = zip(inputs.split(CHUNK), targets.split(CHUNK), strict=True)
    moments = torch.zeros(inputs.shape[1], targets.shape[1]).to(inputs)
    for rows, target in parts:
        moments += rows.T @ target.double()
    return torch.linalg.solve(gram, moments).to(targets.dtype)


class LinearPrior(nn.Module):
    """A linear map from z_t to z_i, which was a strong prior in Kandinsky's ablation.

    It predicts the mean of a caption's image embeddings, from which a prior samples.

    Args:
        dim: D, width of the embeddings.
        normalize: scale predictions to unit length.
        ridge: penalty of `ridge_regression`.
    """

    weight: Tensor

    def __init__(self, dim: int, *, normalize: bool, ridge: float = 10.0):
        super().__init__()
        self.normalize, self.ridge = normalize, ridge
        self.register_buffer("weight", torch.zeros(dim + 1, dim))

    def fit(
        self,
        text_embedding: Float[Tensor, "count dim"],
        image_embedding: Float[Tensor, "count dim"],
    ) -> None:
        """Fit the map to pairs of normalized z_t and z_i."""
        self.weight.copy_(ridge_regression(text_embedding, image_embedding, self.ridge))

    def forward(self, text_embedding: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Predict the image embedding in CLIP's space from a normalized z_t."""
        z_t = F.pad(text_embedding.double(), (0, 1), value=1.0)  # neither autocast nor TF32
        z = (z_t @ self.weight.double()).float()
        return F.normalize(z, dim=-1) if self.normalize else z
