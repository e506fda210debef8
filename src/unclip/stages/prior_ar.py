"""The autoregressive prior P(z_i | caption) (section 2.2)."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from unclip.diffusion import guided
from unclip.diffusion.samplers import Callback
from unclip.networks import ARTransformer, TextTransformer
from unclip.stages.base import Batch
from unclip.stages.caption import CaptionStage
from unclip.stages.codes import Buckets, PrincipalComponents
from unclip.stages.conditioning import NullText, Scaling, Standardise, drop, gather
from unclip.stages.linear import LinearPrior

ENERGY = 0.99  # of the embeddings' variance that the components shall hold (appendix C: > 99%)


class AutoregressivePriorStage(CaptionStage):
    """Caption → CLIP image embedding, one principal component after another.

    Args:
        network: the causal transformer over codes.
        text_width: width of the text states.
        text_encoder: makes the text states of tokens, trained with the stage; None takes CLIP's.
        scaling: how text embeddings are brought to unit variance.
        drop_text: how often training drops the caption, for guidance; the dot product stays.
        candidates: samples drawn a caption, of which the one with the largest z_i · z_t is kept.
        guidance_scale: of sampling, on logits; 1 is none.
        temperature: that logits are divided by.
        top_p: mass of the nucleus that codes are drawn from; 1 is all.
        dot_product_from: the percentile of training's z_i · z_t above which sampling draws the one
            that it asks for (the paper swept 0.5, 0.7, 0.85 and 0.95, and took 0.5).
        normalise: make samples unit vectors, as the CLIP's embeddings are.
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
        dot_product_from: float = 0.5,
        normalise: bool = True,
    ):
        super().__init__()
        if temperature <= 0 or not 0 < top_p <= 1 or not 0 <= dot_product_from < 1:
            raise ValueError(
                "temperature has to be above 0, top_p in (0, 1] and dot_product_from in [0, 1)"
            )
        dim = network.embedding_dim
        self.network = network
        self.text_encoder = text_encoder
        self.text_scaling = Standardise(dim, scaling)
        self.null_text = NullText(dim, text_width)
        self.components = PrincipalComponents(dim, network.components)
        self.buckets = Buckets(network.components, network.buckets)
        self.dot_product_buckets = Buckets(1, network.buckets)
        self.linear = LinearPrior(dim, normalise=normalise)
        self.drop_text = drop_text
        self.candidates = candidates
        self.guidance_scale = guidance_scale
        self.temperature = temperature
        self.top_p = top_p
        self.dot_product_from = dot_product_from
        self.normalise = normalise

    def fit_statistics(self, batches: Iterable[Batch]) -> None:
        """Principal components, buckets, the text embedding's scale and the linear map."""
        image, text = gather(batches, itemgetter("image_embedding"), itemgetter("text_embedding"))
        held = self.components.fit(image)
        kept, wanted = self.network.components, int((held < ENERGY).sum()) + 1
        if kept < wanted:
            warnings.warn(
                f"{kept} components keep {held[kept - 1]:.1%} of the image embeddings' variance; "
                f"network.components={wanted} would keep {ENERGY:.0%}",
                stacklevel=2,
            )
        self.buckets.fit(self.components(image))
        self.dot_product_buckets.fit((image * text).sum(dim=1, keepdim=True))
        self.text_scaling.fit(text)
        self.linear.fit(self.text_scaling(text), image)

    def encode(
        self, image_embedding: Float[Tensor, "batch dim"]
    ) -> Int64[Tensor, "batch components"]:
        """The codes of image embeddings."""
        return self.buckets.encode(self.components(image_embedding))

    def decode(self, codes: Int64[Tensor, "... first"]) -> Float[Tensor, "... dim"]:
        """The image embeddings of codes, in CLIP's space; fewer than all give a blurred one."""
        z = self.components.invert(self.buckets.decode(codes))
        return F.normalize(z, dim=-1) if self.normalise else z

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the next code, in nats a component; "loss_q0" is the first quarter's."""
        condition = self.condition(batch)
        dropped = torch.rand(len(batch["caption"]), device=condition["text_mask"].device)
        condition = drop(condition, self.null(condition), dropped < self.drop_text)
        image = batch["image_embedding"]
        dot_product = (image * batch["text_embedding"]).sum(dim=1, keepdim=True)
        asked = self.dot_product_buckets.encode(dot_product)[:, 0]
        codes = self.encode(image)
        logits = self.network(self.network.prefix(**condition), asked, codes)
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
        """An image embedding in CLIP's space a caption, the best of `candidates` by z_i · z_t.

        Raises:
            ValueError: for steps: there is one for each component.
        """
        if steps is not None:
            raise ValueError(f"{self.name} takes no steps: it makes one for each component")
        shape = (self.candidates, 1 + self.network.components)
        draws = [torch.rand(shape, generator=g, dtype=torch.float64) for g in generators]
        chance = torch.stack(draws).to(condition["text_embedding"].device)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        branches = [(scale, condition), (1 - scale, self.null(condition))]
        z = self.decode(self._draw(guided(self._prepare, branches), chance, callback))
        return self.nearest(z, condition)

    def _prepare(self, **caption: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """`guided` hands two tensors on, x_t and t; here a code stands for both."""
        decoder = self.network.decoder(self.network.prefix(**caption), self.candidates)
        return lambda codes, _: decoder(codes)

    def _draw(
        self, network: Callable[..., Tensor], chance: Tensor, callback: Callback | None
    ) -> Int64[Tensor, "batch candidates components"]:
        """Codes drawn one after another, each by a number in [0, 1) of `chance`."""
        asked, *rest = chance.flatten(0, 1).unbind(dim=1)
        code = self._asked_dot_product(asked)
        codes: list[Tensor] = []
        for number in rest:
            logits = network(code, code)
            code = draw(logits.float() / self.temperature, number, self.top_p)
            codes.append(code)
            if callback is not None:
                so_far = torch.stack(codes, dim=1).unflatten(0, chance.shape[:2])
                callback(len(codes), len(rest), self.decode(so_far))
        return torch.stack(codes, dim=1).unflatten(0, chance.shape[:2])

    def _asked_dot_product(self, chance: Float[Tensor, " rows"]) -> Int64[Tensor, " rows"]:
        """Codes of dot products from the upper part of training's: buckets are equally full."""
        percentile = self.dot_product_from + (1 - self.dot_product_from) * chance
        return (percentile * self.network.buckets).long()


def nucleus(
    probabilities: Float[Tensor, "... buckets"], mass: float
) -> Float[Tensor, "... buckets"]:
    """Probabilities, zero outside the fewest likeliest that hold `mass` (Holtzman et al. 2020)."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(dim=-1) - ordered >= mass
    return torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(outside, 0.0))


def draw(
    logits: Float[Tensor, "rows buckets"], chance: Float[Tensor, " rows"], top_p: float
) -> Int64[Tensor, " rows"]:
    """Codes by the inverse of the cumulative distribution at `chance`, from [0, 1) in float64.

    Codes are in the order of what they stand for, so where rounding differs between batches a
    sample moves at most to the bucket beside.
    """
    cumulative = nucleus(logits.double().softmax(dim=-1), top_p).cumsum(dim=-1)
    return (cumulative <= chance[:, None] * cumulative[:, -1:]).sum(dim=-1)
