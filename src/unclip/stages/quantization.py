"""Quantize an image embedding: principal components, each coded by a bucket (section 2.2).

Both parts are fitted to the training set and saved with the weights. Products are computed in
float64: autocast leaves it alone, and a GPU has no TF32 of it.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

CHUNK = 4096


class PrincipalComponents(nn.Module):
    """Principal components of embeddings, in order of decreasing variance.

    Args:
        dim: D, width of the embeddings.
        components: K, number of components that are kept.

    Raises:
        ValueError: there are more components than dimensions.
    """

    mean: Tensor
    basis: Tensor

    def __init__(self, dim: int, components: int):
        super().__init__()
        if not 0 < components <= dim:
            raise ValueError(f"components is {components}; it can be 1 to {dim}")
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("basis", torch.zeros(dim, components))

    @torch.no_grad()
    def fit(self, z: Float[Tensor, "count dim"]) -> Float[Tensor, " dim"]:
        """Fit mean and components to the data; the moments are summed in float64.

        Returns:
            The share of the variance in the first 1, 2, … D components.
        """
        mean = z.mean(dim=0, dtype=torch.float64)
        moments = torch.zeros(z.shape[1], z.shape[1], dtype=torch.float64, device=z.device)
        for part in z.split(CHUNK):
            centered = part.double() - mean
            moments += centered.T @ centered
        variances, vectors = torch.linalg.eigh(moments.cpu())
        vectors = vectors.flip(1)  # eigh returns ascending eigenvalues
        largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
        basis = vectors * largest.sign()  # the same sign on every machine
        self.mean.copy_(mean)
        self.basis.copy_(basis[:, : self.basis.shape[1]])
        explained = variances.flip(0).clamp(min=0).cumsum(0)
        return explained / explained[-1]

    def forward(self, z: Float[Tensor, "... dim"]) -> Float[Tensor, "... components"]:
        """Project embeddings on the components."""
        return ((z.double() - self.mean) @ self.basis.double()).float()

    def invert(self, values: Float[Tensor, "... first"]) -> Float[Tensor, "... dim"]:
        """Reconstruct embeddings from the first components; the others are at their mean."""
        basis = self.basis[:, : values.shape[-1]].double()
        return (values.double() @ basis.T + self.mean).float()


class Quantizer(nn.Module):
    """Quantize K values, each into buckets that contain equally many values of the training set.

    A code is the index of a bucket, in increasing order; it decodes to the bucket's median.

    Args:
        rows: K, number of values per embedding.
        buckets: number of buckets per value.
    """

    edges: Tensor
    medians: Tensor

    def __init__(self, rows: int, buckets: int):
        super().__init__()
        self.register_buffer("edges", torch.zeros(rows, buckets + 1))
        self.register_buffer("medians", torch.zeros(rows, buckets))

    @torch.no_grad()
    def fit(self, values: Float[Tensor, "count rows"]) -> None:
        """Fit the buckets to the quantiles of each column."""
        steps = 2 * self.medians.shape[1] + 1
        q = torch.linspace(0, 1, steps, device=values.device)
        quantiles = torch.stack([column.quantile(q) for column in values.unbind(dim=1)])
        self.edges.copy_(quantiles[:, ::2])
        self.medians.copy_(quantiles[:, 1::2])

    def encode(self, values: Float[Tensor, "batch rows"]) -> Int64[Tensor, "batch rows"]:
        """Return the codes of values; those out of range get the outermost code."""
        inner = self.edges[:, 1:-1].contiguous()
        return torch.searchsorted(inner, values.T.contiguous()).T

    def decode(self, codes: Int64[Tensor, "... first"]) -> Float[Tensor, "... first"]:
        """Return the median of each code's bucket; fewer than K codes belong to the first rows."""
        return self.medians[torch.arange(codes.shape[-1], device=codes.device), codes]
