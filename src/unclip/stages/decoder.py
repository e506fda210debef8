"""The decoder P(x | z_i, caption) (section 2.1)."""

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unclip.diffusion import GaussianDiffusion, guided, randn
from unclip.diffusion.samplers import Callback
from unclip.networks import TextTransformer, UNet
from unclip.stages.base import Batch, DiffusionStage, mean_losses, timestep_quartiles
from unclip.stages.conditioning import (
    Normalizer,
    NullText,
    Scaling,
    collect,
    drop,
    text_states,
)

CHANNELS = 3


class DecoderStage(DiffusionStage):
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
    """

    name = "decoder"
    needs_clip = True
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

    def fit_statistics(self, batches: Iterable[Batch]) -> None:
        """Fit mean and standard deviation of the embeddings."""
        image, text = collect(batches, itemgetter("image_embedding"), itemgetter("text_embedding"))
        self.image_scaling.fit(image)
        self.text_scaling.fit(text)

    def fit_null_text(self, empty: Batch) -> None:
        """Store CLIP's empty caption as the null caption, unless the null is learned."""
        if not self.null_text.learned:
            self.null_text.fit(self._text(empty))

    def _text(self, batch: Batch) -> dict[str, Tensor]:
        return {
            "text_embedding": self.text_scaling(batch["text_embedding"]),
            "text_states": text_states(batch, self.text_encoder),
            "text_mask": batch["text_mask"],
        }

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """Return the normalized embeddings, text states and mask, with nulls for missing inputs.

        The image embedding may be missing, and the text embedding and states of the caption may be.
        `text_mask` always has to be there, because it determines the shape.
        """
        text = self._text(batch) if "text_embedding" in batch else self.null_text.like(batch)
        if "image_embedding" in batch:
            return {"image_embedding": self.image_scaling(batch["image_embedding"]), **text}
        return {**self.null(batch), **text}

    def null(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the condition without image embedding and caption."""
        null_image = self.null_image_embedding.expand(len(condition["text_mask"]), -1)
        return {"image_embedding": null_image, **self.null_text.like(condition)}

    def without_caption(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace the caption by the null caption."""
        return {**condition, **self.null_text.like(condition)}

    def _dropped(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        null, batch = self.null(condition), len(condition["text_mask"])
        device = condition["text_mask"].device
        image = {"image_embedding": null.pop("image_embedding")}
        condition = drop(
            condition, image, torch.rand(batch, device=device) < self.drop_image_embedding
        )
        return drop(condition, null, torch.rand(batch, device=device) < self.drop_text)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the diffusion loss on `image`; image embedding and caption drop independently."""
        x0 = batch["image"]
        noise = torch.randn_like(x0)
        t = self.diffusion.sample_timesteps(len(x0), x0.device)
        x_t = self.diffusion.add_noise(x0, noise, t)
        condition = self._dropped(self.condition(batch))
        output = self.network(x_t, t, **condition)
        losses = self.diffusion.loss(output, x0, noise, x_t, t)
        quartiles = timestep_quartiles(losses["mse"], t, self.diffusion.timesteps)
        return {**mean_losses(losses), **quartiles}

    def guided(
        self, condition: dict[str, Tensor], guidance_scale: float | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the guided `network(x_t, t)` under a condition; None is the stage's own scale."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        branches = [(scale, condition), (1 - scale, self.null(condition))]
        return guided(self.network.bind, branches, channels=CHANNELS)

    @torch.no_grad()
    def sample(
        self,
        condition: dict[str, Tensor],
        *,
        generators: Sequence[torch.Generator],
        guidance_scale: float | None = None,
        steps: int | None = None,
        callback: Callback | None = None,
    ) -> Float[Tensor, "batch 3 height width"]:
        """Sample images in [-1, 1]."""
        device = condition["image_embedding"].device
        noise = randn((CHANNELS, self.image_size, self.image_size), generators, device)
        return self._sample(
            self.guided(condition, guidance_scale),
            noise.to(memory_format=torch.channels_last),
            clip_range=1.0,
            generators=generators,
            steps=steps,
            callback=callback,
        )
