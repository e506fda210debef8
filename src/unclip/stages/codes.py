"""An image embedding as a row of codes: principal components, each put into a bucket (section 2.2).

Both parts are fitted to the training set and travel with the weights.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

CHUNK = 4096


class PrincipalComponents(nn.Module):
    """The directions in which embeddings vary most, the foremost first.

    Args:
        dim: D.
        components: K, how many are kept.

    Raises:
        ValueError: for more components than dimensions.
    """

    def __init__(self, dim: int, components: int):
        super().__init__()
        if not 0 < components <= dim:
            raise ValueError(f"components is {components}; it can be 1 to {dim}, the embedding's")
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("basis", torch.zeros(dim, components))

    @torch.no_grad()
    def fit(self, z: Float[Tensor, "count dim"]) -> Float[Tensor, " dim"]:
        """Takes mean and directions from the data, its moments summed in float64.

        Returns:
            What part of the variance the first 1, 2, … D components hold.
        """
        mean = z.mean(dim=0, dtype=torch.float64)
        centred = (part.double() - mean for part in z.split(CHUNK))
        variances, vectors = torch.linalg.eigh(sum(part.T @ part for part in centred).cpu())
        vectors = vectors.flip(1)  # eigh gives the smallest first
        largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
        basis = vectors * largest.sign()  # a sign that is the same on every machine
        self.mean.copy_(mean)
        self.basis.copy_(basis[:, : self.basis.shape[1]])
        held = variances.flip(0).clamp(min=0).cumsum(0)
        return held / held[-1]

    def forward(self, z: Float[Tensor, "... dim"]) -> Float[Tensor, "... components"]:
        """The components of embeddings."""
        with torch.autocast(z.device.type, enabled=False):
            return (z.float() - self.mean) @ self.basis

    def invert(self, values: Float[Tensor, "... first"]) -> Float[Tensor, "... dim"]:
        """The embeddings of components, or of the first few while the others are at their mean."""
        with torch.autocast(values.device.type, enabled=False):
            return values @ self.basis[:, : values.shape[-1]].T + self.mean


class Buckets(nn.Module):
    """Puts each of K numbers into one of as many equally full buckets.

    A code is a bucket's index: they are in the order of the numbers. A bucket stands for its
    median.

    Args:
        rows: K.
        buckets: codes that a number can have.
    """

    def __init__(self, rows: int, buckets: int):
        super().__init__()
        self.register_buffer("edges", torch.zeros(rows, buckets + 1))
        self.register_buffer("medians", torch.zeros(rows, buckets))

    @torch.no_grad()
    def fit(self, values: Float[Tensor, "count rows"]) -> None:
        """Takes the quantiles of each column."""
        steps = 2 * self.medians.shape[1] + 1
        at = torch.linspace(0, 1, steps, device=values.device)
        quantiles = torch.stack([column.quantile(at) for column in values.unbind(dim=1)])
        self.edges.copy_(quantiles[:, ::2])
        self.medians.copy_(quantiles[:, 1::2])

    def encode(self, values: Float[Tensor, "batch rows"]) -> Int64[Tensor, "batch rows"]:
        """The codes of numbers; what lies outside goes into the outermost bucket."""
        inner = self.edges[:, 1:-1].contiguous()
        return torch.searchsorted(inner, values.T.contiguous()).T

    def decode(self, codes: Int64[Tensor, "... first"]) -> Float[Tensor, "... first"]:
        """The numbers that codes stand for, of the first few rows where there are no more."""
        return self.medians[torch.arange(codes.shape[-1], device=codes.device), codes]
