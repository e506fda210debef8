"""Spatial feature maps of the conditioning embeddings, and learned positions, for a U-Net.

A U-Net is slow to learn how to turn a vector into a layout. A small MLP from the embeddings to
feature maps at low resolutions provides the layout directly; low rank keeps the maps small. The MLP
needs its hidden layer, because the positions of colors and concepts are mostly not a linear
function of CLIP's embedding of two objects.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class FeatureMap(nn.Module):
    """A low-rank linear map from a vector to one feature map, plus a learned position map.

    map[y, x, c] = Σ_r basis[y, x, r] · (W h)[r, c] + position[y, x, c]

    Args:
        width: width of h.
        channels: channels of the feature map.
        side: height and width of the feature map.
        rank: number of spatial basis functions.
    """

    def __init__(self, width: int, *, channels: int, side: int, rank: int):
        super().__init__()
        self.rank, self.side = rank, side
        self.coefficients = nn.Linear(width, rank * channels)
        self.basis = nn.Parameter(torch.empty(side**2, rank))
        self.position_embedding = nn.Parameter(torch.zeros(side**2, channels))
        # the product is a linear map whose entries have a standard deviation of 0.02
        nn.init.normal_(self.coefficients.weight, std=0.02)
        nn.init.zeros_(self.coefficients.bias)
        nn.init.normal_(self.basis, std=rank**-0.5)

    def forward(
        self, h: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch channels {self.side} {self.side}"]:
        """Compute the feature map, in channels_last memory format."""
        coefficients = self.coefficients(h).unflatten(1, (self.rank, -1))  # (B, R, C)
        basis = self.basis.expand(len(h), -1, -1)
        tokens = torch.baddbmm(self.position_embedding, basis, coefficients)  # (B, HW, C)
        return tokens.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)


class FeatureMaps(nn.Module):
    """Feature maps of the image and text embeddings for some levels of a U-Net.

    Args:
        embedding_dim: D, width of either embedding.
        channels: channels at the start of each level of the U-Net.
        patch: factor between `image_size` and the side of level 0; each level halves the side.
        levels: levels that receive a feature map.
        hidden: width of the hidden layer between the embeddings and all maps.
        rank: number of spatial basis functions per level.
        image_size: height and width of the images; the U-Net then takes no other size.

    Raises:
        ValueError: a level does not exist, or `image_size` does not fit the levels.
    """

    def __init__(
        self,
        embedding_dim: int,
        *,
        channels: Sequence[int],
        patch: int,
        levels: Sequence[int],
        hidden: int,
        rank: int,
        image_size: int,
    ):
        super().__init__()
        if not set(levels) <= set(range(len(channels))):
            raise ValueError(
                f"feature_maps.levels is {list(levels)}; levels are 0 to {len(channels) - 1}"
            )
        stride = patch * 2 ** (len(channels) - 1)
        if image_size % stride:
            raise ValueError(
                f"feature_maps.image_size is {image_size}; it must be a multiple of {stride}"
            )
        self.image_size, self.levels = image_size, tuple(levels)
        self.hidden = nn.Sequential(nn.Linear(2 * embedding_dim, hidden), nn.SiLU())
        sides = [image_size // (patch * 2**level) for level in self.levels]
        self.maps = nn.ModuleList(
            FeatureMap(hidden, channels=channels[level], side=side, rank=rank)
            for level, side in zip(self.levels, sides, strict=True)
        )

    def forward(
        self,
        image_embedding: Float[Tensor, "batch dim"],
        text_embedding: Float[Tensor, "batch dim"],
    ) -> dict[int, Tensor]:
        """Compute the feature map of each level in `levels`."""
        h = self.hidden(torch.cat([image_embedding, text_embedding], dim=1))
        return {level: to_map(h) for level, to_map in zip(self.levels, self.maps, strict=True)}
