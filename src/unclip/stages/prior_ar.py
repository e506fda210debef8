"""The autoregressive prior P(z_i | caption) (section 2.2)."""

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from unclip.batch import Batch
from unclip.device import to_device
from unclip.diffusion.samplers import Callback
from unclip.networks import ARTransformer, TextTransformer
from unclip.stages.conditioning import Normalizer, NullText, Scaling, collect_embeddings
from unclip.stages.linear_prior import LinearPrior
from unclip.stages.prior import PriorBase
from unclip.stages.quantization import PrincipalComponents, Quantizer

EXPLAINED_VARIANCE = 0.99  # share that the components must explain (appendix C: > 99%)


class AutoregressivePriorStage(PriorBase):
    """Caption → CLIP image embedding, one principal component after another.

    Args:
        network: the causal transformer over codes.
        text_width: width of the text states.
        text_encoder: encodes tokens to text states and is trained with the stage; None uses the
            frozen CLIP's states.
        scaling: normalization of the text embeddings (`Normalizer`).
        drop_text: probability of dropping the caption in training, for guidance; the dot product
            is kept.
        candidates: samples per caption; the one with the largest z_i · z_t is returned.
        guidance_scale: guidance scale of sampling, on logits; 1 is no guidance.
        temperature: divisor of the logits.
        top_p: probability mass of the nucleus; 1 samples from all codes.
        min_dot_product_percentile: sampling conditions on a z_i · z_t sampled above this percentile
            of the training set's, in [0, 1) (the paper swept 0.5, 0.7, 0.85 and 0.95, and chose
            0.5).
        normalize: scale samples to unit length, as CLIP's embeddings are.

    Raises:
        ValueError: temperature, top_p or min_dot_product_percentile is out of range.
    """

    name = "prior_ar"

    def __init__(
        self,
        network: ARTransformer,
        *,
        text_width: int,
        text_encoder: TextTransformer | None = None,
        scaling: Scaling = "statistics",
        drop_text: float = 0.1,
        candidates: int = 1,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        min_dot_product_percentile: float = 0.5,
        normalize: bool = True,
    ):
        super().__init__()
        if temperature <= 0 or not 0 < top_p <= 1 or not 0 <= min_dot_product_percentile < 1:
            raise ValueError(
                "temperature must be above 0, top_p in (0, 1] and min_dot_product_percentile in "
                "[0, 1)"
            )
        dim = network.embedding_dim
        self.network = network
        self.text_encoder = text_encoder
        self.text_scaling = Normalizer(dim, scaling)
        self.null_text = NullText(dim, text_width)
        self.components = PrincipalComponents(dim, network.components)
        self.quantizer = Quantizer(network.components, network.buckets)
        self.dot_product_quantizer = Quantizer(1, network.buckets)
        self.linear = LinearPrior(dim, normalize=normalize)
        self.drop_text = drop_text
        self.candidates = candidates
        self.guidance_scale = guidance_scale
        self.temperature = temperature
        self.top_p = top_p
        self.min_dot_product_percentile = min_dot_product_percentile
        self.normalize = normalize

    def fit_statistics(self, batches: Iterable[Batch]) -> None:
        """Fit the principal components, the quantizers, the normalization and the linear prior."""
        z_i, z_t = collect_embeddings(batches)
        explained = self.components.fit(z_i)
        count, needed = self.network.components, int((explained < EXPLAINED_VARIANCE).sum()) + 1
        if count < needed:
            warnings.warn(
                f"{count} components explain {explained[count - 1]:.1%} of the image embeddings' "
                f"variance; network.components={needed} would explain {EXPLAINED_VARIANCE:.0%}",
                stacklevel=2,
            )
        self.quantizer.fit(self.components(z_i))
        self.dot_product_quantizer.fit((z_i * z_t).sum(dim=1, keepdim=True))
        self.text_scaling.fit(z_t)
        self.linear.fit(self.text_scaling(z_t), z_i)

    def encode(
        self, image_embedding: Float[Tensor, "batch dim"]
    ) -> Int64[Tensor, "batch components"]:
        """Return the codes of image embeddings."""
        return self.quantizer.encode(self.components(image_embedding))

    def decode(self, codes: Int64[Tensor, "... first"]) -> Float[Tensor, "... dim"]:
        """Return the image embeddings of codes in CLIP's space; fewer codes give a blurred one."""
        z = self.components.invert(self.quantizer.decode(codes))
        return F.normalize(z, dim=-1) if self.normalize else z

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the cross-entropy of the codes in nats per component, and of each quarter."""
        condition = self._dropped(self.condition(batch))
        image = batch["image_embedding"]
        dot_product = (image * batch["text_embedding"]).sum(dim=1, keepdim=True)
        target_dot_product = self.dot_product_quantizer.encode(dot_product)[:, 0]
        codes = self.encode(image)
        logits = self.network(target_dot_product, codes, **condition)
        nats = F.cross_entropy(logits.movedim(2, 1), codes, reduction="none").mean(dim=0)
        quarters = nats.detach().tensor_split(4)
        parts = {f"loss_q{k}": part.mean() for k, part in enumerate(quarters) if len(part)}
        return {"loss": nats.mean(), **parts}

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
        """Sample an image embedding per caption: the candidate with the largest z_i · z_t.

        Raises:
            ValueError: `steps` is given; there is one step per component.
        """
        if steps is not None:
            raise ValueError(f"{self.name} takes no steps: it samples one component per step")
        shape = (self.candidates, 1 + self.network.components)
        rows = [torch.rand(shape, generator=g, dtype=torch.float64) for g in generators]
        uniform = to_device(torch.stack(rows), condition["text_embedding"].device)
        codes = self._sample_codes(self.bind(condition, guidance_scale), uniform, callback)
        return self._best_candidate(self.decode(codes), condition)

    def _bind(self, **caption: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return `network(codes, codes)`; `guided` passes two tensors, x_t and t."""
        decoder = self.network.decoder(self.network.prefix(**caption), self.candidates)
        return lambda codes, _: decoder(codes)

    def _sample_codes(
        self, network: Callable[..., Tensor], uniform: Tensor, callback: Callback | None
    ) -> Int64[Tensor, "batch candidates components"]:
        """Sample codes one after another, each from a number of `uniform` in [0, 1)."""
        first, *rest = uniform.flatten(0, 1).unbind(dim=1)
        code = self._target_dot_product(first)
        codes: list[Tensor] = []
        for number in rest:
            logits = network(code, code)
            code = sample_code(logits.float() / self.temperature, number, self.top_p)
            codes.append(code)
            if callback is not None:
                so_far = torch.stack(codes, dim=1).unflatten(0, uniform.shape[:2])
                callback(len(codes), len(rest), self.decode(so_far))
        return torch.stack(codes, dim=1).unflatten(0, uniform.shape[:2])

    def _target_dot_product(self, uniform: Float[Tensor, " rows"]) -> Int64[Tensor, " rows"]:
        """Return codes of dot products above the percentile: codes are equally likely."""
        lowest = self.min_dot_product_percentile
        percentile = lowest + (1 - lowest) * uniform
        return (percentile * self.network.buckets).long()


def nucleus(
    probabilities: Float[Tensor, "... buckets"], mass: float
) -> Float[Tensor, "... buckets"]:
    """Set probabilities outside the smallest set of mass `mass` to zero (Holtzman et al. 2020)."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(dim=-1) - ordered >= mass
    return torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(outside, 0.0))


def sample_code(
    logits: Float[Tensor, "rows buckets"], uniform: Float[Tensor, " rows"], top_p: float
) -> Int64[Tensor, " rows"]:
    """Sample codes by the inverse CDF at `uniform`, float64 numbers in [0, 1).

    Codes are in the order of their values, so a rounding difference between batches moves a sample
    at most to the neighboring code.
    """
    cumulative = nucleus(logits.double().softmax(dim=-1), top_p).cumsum(dim=-1)
    return (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(dim=-1)
