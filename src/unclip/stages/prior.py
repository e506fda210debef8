"""The diffusion prior P(z_i | caption) (section 2.2)."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from operator import itemgetter

import torch
from jaxtyping import Float
from torch import Tensor

from unclip.diffusion import GaussianDiffusion, guided, randn
from unclip.diffusion.samplers import Callback
from unclip.networks import PriorTransformer, TextTransformer
from unclip.stages.base import Batch, DiffusionStage, mean_losses, timestep_quartiles
from unclip.stages.caption import CaptionStage
from unclip.stages.conditioning import NullText, Scaling, Standardise, drop, gather
from unclip.stages.linear import LinearPrior

VARIANCE_BATCHES = 100


class PriorStage(CaptionStage, DiffusionStage):
    """Caption → CLIP image embedding.

    Args:
        network: the causal transformer.
        diffusion: predicts x0 in the paper.
        sampler: a sampler of `unclip.diffusion` with its steps bound.
        text_width: width of the text states.
        text_encoder: makes the text states of tokens, trained with the stage; None takes CLIP's.
        scaling: how embeddings are brought to unit variance.
        text_scaling: how z_t is, where that is another way; None is `scaling`.
        learn_null_text: train the caption that stands for none; else it is CLIP's empty one.
        drop_text: how often training drops the caption, for guidance.
        noises: noised embeddings trained on a caption and pass; they share the caption's prefix.
        candidates: samples drawn a caption, of which the one with the largest z_i · z_t is kept.
        guidance_scale: of sampling; 1 is none.
        clip: bound of the standardised x0 while sampling.
        normalise: make samples unit vectors, as the CLIP's embeddings are.
        linear_baseline: also fit the linear map that a prior has to beat.
    """

    name = "prior"

    def __init__(
        self,
        network: PriorTransformer,
        diffusion: GaussianDiffusion,
        sampler: Callable[..., Tensor],
        *,
        text_width: int,
        text_encoder: TextTransformer | None = None,
        scaling: Scaling = "statistics",
        text_scaling: Scaling | None = None,
        learn_null_text: bool = True,
        drop_text: float = 0.1,
        noises: int = 1,
        candidates: int = 2,
        guidance_scale: float = 1.0,
        clip: float | None = None,
        normalise: bool = True,
        linear_baseline: bool = False,
    ):
        super().__init__(network, diffusion, sampler)
        self.image_scaling = Standardise(network.embedding_dim, scaling)
        self.text_scaling = Standardise(network.embedding_dim, text_scaling or scaling)
        self.null_text = NullText(network.embedding_dim, text_width, learned=learn_null_text)
        linear = LinearPrior(network.embedding_dim, normalise=normalise)
        self.linear = linear if linear_baseline else None
        self.text_encoder = text_encoder
        self.drop_text = drop_text
        self.noises = noises
        self.candidates = candidates
        self.guidance_scale = guidance_scale
        self.clip = clip
        self.normalise = normalise

    def fit_statistics(self, batches: Iterable[Batch]) -> None:
        """Mean and standard deviation of the image and text embeddings, and the linear map."""
        image, text = gather(batches, itemgetter("image_embedding"), itemgetter("text_embedding"))
        self.image_scaling.fit(image)
        self.text_scaling.fit(text)
        if self.linear is not None:
            self.linear.fit(self.text_scaling(text), image)

    def fit_null_text(self, empty: Batch) -> None:
        """Takes CLIP's empty caption for none, unless that is learned."""
        if not self.null_text.learned:
            self.null_text.fit(self.condition(empty))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Mean square error of the predicted embedding over several noises a caption."""
        condition = self.condition(batch)
        dropped = torch.rand(len(batch["caption"]), device=condition["text_mask"].device)
        condition = drop(condition, self.null(condition), dropped < self.drop_text)
        *noised, t = self._noised(batch, condition)
        losses = self.diffusion.loss(*noised, t)
        quartiles = timestep_quartiles(losses["mse"], t, self.diffusion.timesteps)
        return {**mean_losses(losses), **quartiles}

    def _noised(self, batch: Batch, condition: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The output on noised embeddings, and their x0, noise, x_t and t, `B · noises` rows."""
        x0 = self.image_scaling(batch["image_embedding"]).repeat_interleave(self.noises, dim=0)
        noise = torch.randn_like(x0)
        t = self.diffusion.sample_timesteps(len(x0), x0.device)
        x_t = self.diffusion.add_noise(x0, noise, t)
        prefix = self.network.prefix(**condition)
        output = self.network.suffix(
            prefix, x_t.unflatten(0, (-1, self.noises)), t.unflatten(0, (-1, self.noises))
        )
        return output.flatten(0, 1), x0, noise, x_t, t

    @torch.no_grad()
    def fit_variance(self, batches: Iterable[Batch]) -> None:
        """For an analytic variance, how far x0 is off at each timestep."""
        if self.diffusion.variance != "analytic":
            return
        timesteps, errors = [], []
        for batch in islice(batches, VARIANCE_BATCHES):
            output, x0, _, x_t, t = self._noised(batch, self.condition(batch))
            predicted = self.diffusion.read(output, x_t, t, self.clip).x0
            timesteps.append(t)
            errors.append((predicted - x0).square().mean(dim=1))
        self.diffusion.fit_error(torch.cat(timesteps), torch.cat(errors))

    def _prepare(self, **caption: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        prefix = self.network.prefix(**caption)
        return lambda x_t, t: self.network.suffix(prefix, x_t, t[:, None].expand(x_t.shape[:2]))

    @torch.no_grad()
    def sample(
        self,
        condition: dict[str, Tensor],
        *,
        generators: Sequence[torch.Generator],
        guidance_scale: float | None = None,
        steps: int | None = None,
        callback: Callback | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """An image embedding in CLIP's space a caption, the best of `candidates` by z_i · z_t."""
        shape = (self.candidates, self.network.embedding_dim)
        noise = randn(shape, generators, condition["text_embedding"].device)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        branches = [(scale, condition), (1 - scale, self.null(condition))]
        sampled = self._sample(
            guided(self._prepare, branches),
            noise,
            clip=self.clip,
            generators=generators,
            steps=steps,
            callback=callback,
        )
        z = self.image_scaling.invert(sampled)
        if self.normalise:
            z = torch.nn.functional.normalize(z, dim=-1)
        return self.nearest(z, condition)
