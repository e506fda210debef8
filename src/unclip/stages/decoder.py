"""The decoder P(x | z_i, caption) (section 2.1)."""

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unclip.diffusion import GaussianDiffusion, guided, randn, within
from unclip.diffusion.samplers import Callback
from unclip.networks import TextTransformer, UNet
from unclip.stages.base import Batch, DiffusionStage, mean_losses, timestep_quartiles
from unclip.stages.conditioning import (
    NullText,
    Scaling,
    Standardise,
    drop,
    gather,
    text_states,
)

CHANNELS = 3


class DecoderStage(DiffusionStage):
    """CLIP image embedding and caption → image.

    Args:
        network: a U-Net with conditioning.
        diffusion: eps with a learned-range variance in the paper; x0 where the network has a patch.
        sampler: a sampler of `unclip.diffusion` with its steps bound.
        embedding_dim: D of the CLIP.
        text_width: width of the text states.
        text_encoder: makes the text states of tokens, trained with the stage; None takes CLIP's.
        image_size: height and width of a sample.
        scaling: how embeddings are brought to unit variance.
        learn_null_text: train the caption that stands for none; else it is CLIP's empty one.
        drop_image_embedding: how often training drops z_i (section 2.1: 10%).
        drop_text: how often training drops the caption (section 2.1: 50%).
        guidance_scale: of sampling; 1 is none.
        text_guidance_scale: of the caption, where the image embedding's shall be another; None is
            `guidance_scale`.
        guidance_interval: first and last timestep at which sampling is guided; None is all.
        guidance_rescale: how far guidance is kept from raising contrast, from 0 to 1.
        threshold_percentile: of dynamic thresholding; None clips x0 to [-1, 1].
    """

    name = "decoder"
    needs_clip = True

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
        text_guidance_scale: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
        guidance_rescale: float = 0.0,
        threshold_percentile: float | None = None,
    ):
        super().__init__(network, diffusion, sampler)
        self.image_scaling = Standardise(embedding_dim, scaling)
        self.text_scaling = Standardise(embedding_dim, scaling)
        self.null_image_embedding = nn.Parameter(torch.zeros(1, embedding_dim))
        self.null_text = NullText(embedding_dim, text_width, learned=learn_null_text)
        self.image_size = image_size
        self.drop_image_embedding = drop_image_embedding
        self.text_encoder = text_encoder
        self.drop_text = drop_text
        self.guidance_scale = guidance_scale
        self.text_guidance_scale = text_guidance_scale
        self.guidance_interval = guidance_interval
        self.guidance_rescale = guidance_rescale
        self.threshold_percentile = threshold_percentile

    def fit_statistics(self, batches: Iterable[Batch]) -> None:
        """Fit mean and standard deviation of the embeddings."""
        image, text = gather(batches, itemgetter("image_embedding"), itemgetter("text_embedding"))
        self.image_scaling.fit(image)
        self.text_scaling.fit(text)

    def fit_null_text(self, empty: Batch) -> None:
        """Takes CLIP's empty caption for none, unless that is learned."""
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
        """The image embedding alone."""
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
        """The diffusion loss on `image`, with image embedding and caption dropped independently."""
        x0 = batch["image"]
        noise = torch.randn_like(x0)
        t = self.diffusion.sample_timesteps(len(x0), x0.device)
        x_t = self.diffusion.add_noise(x0, noise, t)
        output = self.network(x_t, t, **self._dropped(self.condition(batch)))
        losses = self.diffusion.loss(output, x0, noise, x_t, t)
        quartiles = timestep_quartiles(losses["mse"], t, self.diffusion.timesteps)
        return {**mean_losses(losses), **quartiles}

    def guided(
        self, condition: dict[str, Tensor], guidance_scale: float | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """`network(x_t, t)` under a condition, guided as in sampling.

        A scale that is given stands in for both of the stage's.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        text_scale = scale
        if guidance_scale is None and self.text_guidance_scale is not None:
            text_scale = self.text_guidance_scale
        null, without_text = self.null(condition), self.without_caption(condition)
        branches = [(text_scale, condition), (scale - text_scale, without_text), (1 - scale, null)]
        network = guided(
            self.network.prepare, branches, channels=CHANNELS, rescale=self.guidance_rescale
        )
        if self.guidance_interval is None or scale == text_scale == 1:
            return network
        return within(self.guidance_interval, network, self.network.prepare(**condition))

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
        """Images in [-1, 1]."""
        device = condition["image_embedding"].device
        noise = randn((CHANNELS, self.image_size, self.image_size), generators, device)
        return self._sample(
            self.guided(condition, guidance_scale),
            noise.to(memory_format=torch.channels_last),
            clip=1.0,
            percentile=self.threshold_percentile,
            generators=generators,
            steps=steps,
            callback=callback,
        )
