"""A first guess of the picture that an image embedding stands for.

Where a decoder can only be trained for some thousand steps, what it learns last is where things
are: at high noise a U-Net must paint a layout out of a vector. A perceptron learns the mean picture
of an embedding in a fraction of that time, so the network is handed its guess as more input
channels and starts from it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import trange

LEARNING_RATE = 3e-3
WARMUP = 50
BATCH = 128


class FittedLinear(nn.Module):
    """A linear layer of buffers: fitted before a run, and left alone by its optimizer."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        layer = nn.Linear(inputs, outputs)
        self.register_buffer("weight", layer.weight.detach())
        self.register_buffer("bias", layer.bias.detach())

    def forward(self, x: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch outputs"]:
        """`x Wᵀ + b`."""
        return F.linear(x, self.weight, self.bias)


class Draft(nn.Module):
    """The mean small picture of an embedding, by a perceptron; fitted before the stage is trained.

    Args:
        dim: D, width of the (standardised) embedding.
        size: height and width of the picture that is predicted.
        width: of the two hidden layers.
        steps: of the fit, each of 128 pictures.
    """

    def __init__(self, dim: int, *, size: int, width: int, steps: int):
        super().__init__()
        self.size, self.steps = size, steps
        self.network = nn.Sequential(
            FittedLinear(dim, width),
            nn.GELU(),
            FittedLinear(width, width),
            nn.GELU(),
            FittedLinear(width, 3 * size * size),
        )

    def shrink(
        self, image: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 {self.size} {self.size}"]:
        """A picture at the size that is predicted, averaged by area."""
        return F.interpolate(image, size=self.size, mode="area")

    @torch.enable_grad()
    def fit(
        self,
        z: Float[Tensor, "count dim"],
        pictures: Float[Tensor, "count 3 {self.size} {self.size}"],
    ) -> None:
        """Regresses the pictures on the embeddings; the learning rate falls to nothing."""
        pictures, generator = pictures.flatten(1), torch.Generator().manual_seed(0)
        weights = [buffer.requires_grad_() for buffer in self.network.buffers()]
        optimizer = torch.optim.AdamW(weights, LEARNING_RATE, betas=(0.9, 0.99), fused=True)
        for step in trange(self.steps, desc="draft", unit="step"):
            rate = LEARNING_RATE * min(1.0, step / WARMUP) * (1 - step / self.steps)
            optimizer.param_groups[0]["lr"] = rate
            rows = torch.randint(len(z), (BATCH,), generator=generator).to(z.device)
            loss = F.mse_loss(self.network(z[rows]), pictures[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for weight in weights:
            weight.requires_grad_(False).grad = None

    def forward(
        self, z: Float[Tensor, "batch dim"], image_size: int
    ) -> Float[Tensor, "batch 3 image_size image_size"]:
        """The guess, enlarged to `image_size`."""
        small = self.network(z).unflatten(1, (3, self.size, self.size))
        return F.interpolate(small, size=image_size, mode="bilinear", align_corners=False)
