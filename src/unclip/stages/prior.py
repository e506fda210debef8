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
from unclip.stages.conditioning import Normalizer, NullText, Scaling, collect, drop
from unclip.stages.linear_prior import LinearPrior
from unclip.stages.prior_base import PriorBase

VARIANCE_BATCHES = 100


class PriorStage(PriorBase, DiffusionStage):
    """Caption → CLIP image embedding.

    Args:
        network: the causal transformer.
        diffusion: the diffusion process; the paper predicts x0.
        sampler: a sampler of `unclip.diffusion` with its steps bound by `functools.partial`.
        text_width: width of the text states.
        text_encoder: encodes tokens to text states and is trained with the stage; None uses the
            frozen CLIP's states.
        scaling: normalization of the embeddings (`Normalizer`).
        text_scaling: normalization of z_t, if it differs; None is `scaling`.
        learn_null_text: train the null caption; otherwise it is CLIP's empty caption.
        drop_text: probability of dropping the caption in training, for guidance.
        num_noise_samples: noised embeddings per caption in a training step; they share the
            caption's prefix.
        candidates: samples per caption; the one with the largest z_i · z_t is returned.
        guidance_scale: guidance scale of sampling; 1 is no guidance.
        clip_range: bound on the normalized x0 in sampling; None is no bound.
        normalize: scale samples to unit length, as CLIP's embeddings are.
        linear_baseline: also fit the linear prior, the baseline of a prior.
    """

    name = "prior"
    network: PriorTransformer

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
        num_noise_samples: int = 1,
        candidates: int = 2,
        guidance_scale: float = 1.0,
        clip_range: float | None = None,
        normalize: bool = True,
        linear_baseline: bool = False,
    ):
        super().__init__(network, diffusion, sampler)
        self.image_scaling = Normalizer(network.embedding_dim, scaling)
        self.text_scaling = Normalizer(network.embedding_dim, text_scaling or scaling)
        self.null_text = NullText(network.embedding_dim, text_width, learned=learn_null_text)
        linear = LinearPrior(network.embedding_dim, normalize=normalize)
        self.linear = linear if linear_baseline else None
        self.text_encoder = text_encoder
        self.drop_text = drop_text
        self.num_noise_samples = num_noise_samples
        self.candidates = candidates
        self.guidance_scale = guidance_scale
        self.clip_range = clip_range
        self.normalize = normalize

    def fit_statistics(self, batches: Iterable[Batch]) -> None:
        """Fit the normalization of the embeddings, and the linear prior."""
        image, text = collect(batches, itemgetter("image_embedding"), itemgetter("text_embedding"))
        self.image_scaling.fit(image)
        self.text_scaling.fit(text)
        if self.linear is not None:
            self.linear.fit(self.text_scaling(text), image)

    def fit_null_text(self, empty: Batch) -> None:
        """Store CLIP's empty caption as the null caption, unless the null is learned."""
        if not self.null_text.learned:
            self.null_text.fit(self.condition(empty))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the mean squared error of the prediction, over several noises per caption."""
        condition = self.condition(batch)
        dropped = torch.rand(len(batch["caption"]), device=condition["text_mask"].device)
        condition = drop(condition, self.null(condition), dropped < self.drop_text)
        output, x0, noise, x_t, t = self._noised(batch, condition)
        losses = self.diffusion.loss(output, x0, noise, x_t, t)
        quartiles = timestep_quartiles(losses["mse"], t, self.diffusion.timesteps)
        return {**mean_losses(losses), **quartiles}

    def _noised(
        self, batch: Batch, condition: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the network's output, x0, noise, x_t and t, with B · num_noise_samples rows."""
        copies = self.num_noise_samples
        x0 = self.image_scaling(batch["image_embedding"]).repeat_interleave(copies, dim=0)
        noise = torch.randn_like(x0)
        t = self.diffusion.sample_timesteps(len(x0), x0.device)
        x_t = self.diffusion.add_noise(x0, noise, t)
        prefix = self.network.prefix(**condition)
        output = self.network.suffix(
            prefix, x_t.unflatten(0, (-1, copies)), t.unflatten(0, (-1, copies))
        )
        return output.flatten(0, 1), x0, noise, x_t, t

    @torch.no_grad()
    def fit_variance(self, batches: Iterable[Batch]) -> None:
        """Measure the error of x0 at each timestep, for the analytic variance."""
        if self.diffusion.variance != "analytic":
            return
        timesteps, errors = [], []
        for batch in islice(batches, VARIANCE_BATCHES):
            output, x0, _, x_t, t = self._noised(batch, self.condition(batch))
            predicted = self.diffusion.predict(output, x_t, t, self.clip_range).x0
            timesteps.append(t)
            errors.append((predicted - x0).square().mean(dim=1))
        self.diffusion.fit_error(torch.cat(timesteps), torch.cat(errors))

    def _bind(self, **caption: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
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
        """Sample an image embedding per caption: the candidate with the largest z_i · z_t."""
        shape = (self.candidates, self.network.embedding_dim)
        noise = randn(shape, generators, condition["text_embedding"].device)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        branches = [(scale, condition), (1 - scale, self.null(condition))]
        sampled = self._sample(
            guided(self._bind, branches),
            noise,
            clip_range=self.clip_range,
            generators=generators,
            steps=steps,
            callback=callback,
        )
        z = self.image_scaling.denormalize(sampled)
        if self.normalize:
            z = torch.nn.functional.normalize(z, dim=-1)
        return self.best_candidate(z, condition)
