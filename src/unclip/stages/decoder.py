"""The decoder P(x | z_i, caption) (section 2.1)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unclip.batch import Batch
from unclip.diffusion import GaussianDiffusion, guided, randn
from unclip.diffusion.samplers import Denoise
from unclip.networks import TextTransformer, UNet
from unclip.stages.base import DiffusionStage
from unclip.stages.conditioning import (
    CaptionStage,
    Normalizer,
    NullText,
    Scaling,
    collect_embeddings,
    drop,
)
from unclip.stages.layout import LayoutHead

CHANNELS = 3


class DecoderStage(CaptionStage, DiffusionStage):
    """CLIP image embedding and caption → image.

    Args:
        network: a U-Net with conditioning.
        diffusion: the diffusion process; the paper predicts eps with a learned-range variance, a
            network with a patch must predict x0.
        sampler: a sampler of `unclip.diffusion` with its steps bound by `functools.partial`.
        embedding_dim: D, width of CLIP's embeddings.
        text_width: width of the text states.
        text_encoder: encodes tokens to text states and is trained with the stage; None uses the
            frozen CLIP's states.
        image_size: height and width of a sample in pixels.
        scaling: normalization of the embeddings (`Normalizer`).
        learn_null_text: train the null caption; otherwise it is CLIP's empty caption.
        drop_image_embedding: probability of dropping z_i in training (section 2.1: 10%).
        drop_text: probability of dropping the caption in training (section 2.1: 50%).
        guidance_scale: guidance scale of sampling; 1 is no guidance.
        guidance_interval: first and last timestep with guidance; None is all timesteps
            (Kynkäänniemi et al. 2024).
        layout: `level` of the network whose features are classified in training, `classes` of each
            map of labels, and `weight` of that loss (`LayoutHead`); None for the paper's loss.
    """

    name = "decoder"
    network: UNet

    def __init__(
        self,
        network: UNet,
        diffusion: GaussianDiffusion,
        sampler: Callable[..., Tensor],
        *,
        embedding_dim: int,
        text_width: int,
        text_encoder: TextTransformer | None = None,
        image_size: int = 64,
        scaling: Scaling = "none",
        learn_null_text: bool = True,
        drop_image_embedding: float = 0.1,
        drop_text: float = 0.5,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[int] | None = None,
        layout: dict[str, Any] | None = None,
    ):
        super().__init__(network, diffusion, sampler)
        self.image_scaling = Normalizer(embedding_dim, scaling)
        self.text_scaling = Normalizer(embedding_dim, scaling)
        self.null_image_embedding = nn.Parameter(torch.zeros(1, embedding_dim))
        self.null_text = NullText(embedding_dim, text_width, learned=learn_null_text)
        self.image_size = image_size
        self.drop_image_embedding = drop_image_embedding
        self.text_encoder = text_encoder
        self.drop_text = drop_text
        self.guidance_scale = guidance_scale
        self.guidance_interval = guidance_interval
        self.layout = layout
        self.layout_head = None
        if layout is not None:
            self.layout_head = LayoutHead(network.widths[layout["level"]], layout["classes"])

    def fit_statistics(self, batches: Iterable[Batch]) -> None:
        """Fit mean and standard deviation of the embeddings."""
        z_i, z_t = collect_embeddings(batches)
        self.image_scaling.fit(z_i)
        self.text_scaling.fit(z_t)

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """Return the normalized embeddings, text states and mask, with nulls for missing inputs.

        The batch may have no image embedding, or no text embedding and states. It always needs
        `text_mask`, which determines the shape.
        """
        condition = self.null({"text_mask": batch["text_mask"]})
        if "image_embedding" in batch:
            condition["image_embedding"] = self.image_scaling(batch["image_embedding"])
        return condition | (self.text(batch) if "text_embedding" in batch else {})

    def null(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the condition without image embedding and caption; only the mask is used."""
        text_mask = condition["text_mask"]
        null_image = self.null_image_embedding.expand(len(text_mask), -1)
        return {"image_embedding": null_image, **self.null_text.like(text_mask)}

    def _dropped(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        null = self.null(condition)
        null_image = {"image_embedding": null.pop("image_embedding")}
        condition = drop(condition, null_image, self.drop_image_embedding)
        return drop(condition, null, self.drop_text)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the diffusion loss on `image`; image embedding and caption drop independently.

        With `layout`, that loss is added, for the batch's `labels`.
        """
        noised = self._noised(batch["image"])
        condition = self._dropped(self.condition(batch))
        if self.layout is None or self.layout_head is None:
            return self._losses(self.network(noised.x_t, noised.t, **condition), noised)
        output, features = self.network(
            noised.x_t, noised.t, features_of=self.layout["level"], **condition
        )
        losses = self._losses(output, noised)
        layout = self.layout_head(features, batch.get("labels"))
        loss = losses["loss"] + self.layout["weight"] * layout
        return losses | {"loss": loss, "layout": layout.detach()}

    def bind(
        self, condition: dict[str, Tensor], guidance_scale: float | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the guided U-Net under a condition; a scale of None is the stage's own."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        null = self.null(condition)
        return guided(self.network.bind, condition, null, scale, channels=CHANNELS)

    def denoiser(
        self, condition: dict[str, Tensor], guidance_scale: float | None = None
    ) -> Denoise:
        """Return `denoise(x_t, t)`, which is guided inside `guidance_interval`."""
        guided_denoise = super().denoiser(condition, guidance_scale)
        if self.guidance_interval is None or guidance_scale == 1:
            return guided_denoise
        plain, (first, last) = super().denoiser(condition, 1.0), self.guidance_interval
        return lambda x_t, t: (guided_denoise if first <= t <= last else plain)(x_t, t)

    def noise(
        self, condition: dict[str, Tensor], generators: Sequence[torch.Generator]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return the noise x_T of each row of `condition`, in channels_last memory format."""
        shape, device = (CHANNELS, self.image_size, self.image_size), condition["text_mask"].device
        return randn(shape, generators, device).to(memory_format=torch.channels_last)
