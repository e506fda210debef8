"""The diffusion prior P(z_i | caption), and the base of both priors (section 2.2)."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unclip.batch import Batch
from unclip.diffusion import GaussianDiffusion, guided, randn
from unclip.networks import PriorTransformer, TextTransformer
from unclip.stages.base import DiffusionStage, Noised
from unclip.stages.conditioning import (
    CaptionStage,
    Normalizer,
    NullText,
    Scaling,
    collect_embeddings,
    drop,
)
from unclip.stages.linear_prior import LinearPrior

VARIANCE_BATCHES = 100


class PriorBase(CaptionStage):
    """Caption → CLIP image embedding."""

    drop_text: float

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """Return the text states, their mask and the normalized text embedding."""
        return self.text(batch)

    def null(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the condition of the null caption."""
        return self.null_text.like(condition["text_mask"])

    def bind(
        self, condition: dict[str, Tensor], guidance_scale: float | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the guided network under a condition; a scale of None is the stage's own."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return guided(self._bind, condition, self.null(condition), scale)

    def _bind(self, **caption: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the network under a caption, whose prefix is computed once."""
        raise NotImplementedError

    def _dropped(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        return drop(condition, self.null(condition), self.drop_text)

    def _best_candidate(
        self, z: Float[Tensor, "batch candidates dim"], condition: dict[str, Tensor]
    ) -> Float[Tensor, "batch dim"]:
        """Return each caption's candidate with the largest z_i · z_t."""
        text_embedding = self.text_scaling.denormalize(condition["text_embedding"])
        best = torch.einsum("bnd,bd->bn", z, text_embedding).argmax(dim=1)
        return z[torch.arange(len(z), device=z.device), best]


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
        linear_baseline: also fit the linear prior, as a baseline.
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
        z_i, z_t = collect_embeddings(batches)
        self.image_scaling.fit(z_i)
        self.text_scaling.fit(z_t)
        if self.linear is not None:
            self.linear.fit(self.text_scaling(z_t), z_i)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the mean squared error of the prediction, over several noises per caption."""
        condition = self._dropped(self.condition(batch))
        noised = self._noised_copies(batch)
        return self._losses(self._predict(noised, condition), noised)

    def _noised_copies(self, batch: Batch) -> Noised:
        """Return B · num_noise_samples noised embeddings; a caption's are consecutive rows."""
        x0 = self.image_scaling(batch["image_embedding"])
        return self._noised(x0.repeat_interleave(self.num_noise_samples, dim=0))

    def _predict(self, noised: Noised, condition: dict[str, Tensor]) -> Tensor:
        copies = (-1, self.num_noise_samples)
        x_t, t = noised.x_t.unflatten(0, copies), noised.t.unflatten(0, copies)  # (B, N, …)
        return self.network(x_t, t, **condition).flatten(0, 1)

    @torch.no_grad()
    def fit_variance(self, batches: Iterable[Batch]) -> None:
        """Measure the error of x0 at each timestep, for the analytic variance."""
        if self.diffusion.variance != "analytic":
            return
        timesteps, errors = [], []
        for batch in islice(batches, VARIANCE_BATCHES):
            noised = self._noised_copies(batch)
            output = self._predict(noised, self.condition(batch))
            predicted = self.diffusion.predict(output, noised.x_t, noised.t, self.clip_range).x0
            timesteps.append(noised.t)
            errors.append((predicted - noised.x0).square().mean(dim=1))
        self.diffusion.fit_error(torch.cat(timesteps), torch.cat(errors))

    def _bind(self, **caption: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        prefix = self.network.prefix(**caption)
        return lambda x_t, t: self.network.suffix(prefix, x_t, t[:, None].expand(x_t.shape[:2]))

    def noise(
        self, condition: dict[str, Tensor], generators: Sequence[torch.Generator]
    ) -> Float[Tensor, "batch candidates dim"]:
        """Return the noise x_T of each candidate."""
        shape = (self.candidates, self.network.embedding_dim)
        return randn(shape, generators, condition["text_embedding"].device)

    def _finish(
        self, x0: Float[Tensor, "batch candidates dim"], condition: dict[str, Tensor]
    ) -> Float[Tensor, "batch dim"]:
        z = self.image_scaling.denormalize(x0)
        z = F.normalize(z, dim=-1) if self.normalize else z
        return self._best_candidate(z, condition)
