"""A linear first guess of the picture that an image embedding stands for.

Where a decoder can only be trained for some thousand steps, what it learns last is where things
are: at high noise a U-Net must paint a layout out of a vector. The best linear map from embedding
to picture has a closed form, so the network is handed that map's picture as more input channels and
starts from it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unclip.stages.linear import ridge_regression


class LinearDraft(nn.Module):
    """Ridge regression of a small picture on an embedding; fitted, not trained.

    Args:
        dim: D, width of the (standardised) embedding.
        size: height and width of the picture that is predicted.
        ridge: as `ridge_regression` takes it.
    """

    def __init__(self, dim: int, size: int, ridge: float = 10.0):
        super().__init__()
        self.size, self.ridge = size, ridge
        self.register_buffer("weight", torch.zeros(dim + 1, 3 * size * size))

    def shrink(
        self, image: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 {self.size} {self.size}"]:
        """A picture at the size that is predicted, averaged by area."""
        return F.interpolate(image, size=self.size, mode="area")

    def fit(
        self,
        z: Float[Tensor, "count dim"],
        pictures: Float[Tensor, "count 3 {self.size} {self.size}"],
    ) -> None:
        """Solves the normal equations."""
        self.weight.copy_(ridge_regression(z, pictures.flatten(1), self.ridge))

    def forward(
        self, z: Float[Tensor, "batch dim"], image_size: int
    ) -> Float[Tensor, "batch 3 image_size image_size"]:
        """The guess, enlarged to `image_size`."""
        small = F.pad(z, (0, 1), value=1.0) @ self.weight
        small = small.unflatten(1, (3, self.size, self.size))
        return F.interpolate(small, size=image_size, mode="bilinear", align_corners=False)
