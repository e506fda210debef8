"""The common base of both priors (section 2.2)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unclip.batch import Batch
from unclip.diffusion import guided
from unclip.stages.base import Stage
from unclip.stages.conditioning import Normalizer, NullText, drop, text_states


class PriorBase(Stage):
    """Caption → CLIP image embedding."""

    needs_clip = True
    text_encoder: nn.Module | None
    text_scaling: Normalizer
    null_text: NullText
    drop_text: float
    guidance_scale: float

    def fit_null_text(self, empty: Batch) -> None:
        """Store CLIP's empty caption as the null caption, unless the null is learned."""
        if not self.null_text.learned:
            self.null_text.fit(self.condition(empty))

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """Return the text states, their mask and the normalized text embedding."""
        return {
            "text_states": text_states(batch, self.text_encoder),
            "text_mask": batch["text_mask"],
            "text_embedding": self.text_scaling(batch["text_embedding"]),
        }

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
