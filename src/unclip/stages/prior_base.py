"""The common base of both priors (section 2.2)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unclip.stages.base import Batch, Stage
from unclip.stages.conditioning import Normalizer, NullText, text_states


class PriorBase(Stage):
    """Caption → CLIP image embedding."""

    needs_clip = True
    text_encoder: nn.Module | None
    text_scaling: Normalizer
    null_text: NullText

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """Return the text states, their mask and the normalized text embedding."""
        return {
            "text_states": text_states(batch, self.text_encoder),
            "text_mask": batch["text_mask"],
            "text_embedding": self.text_scaling(batch["text_embedding"]),
        }

    def null(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the condition of the null caption."""
        return self.null_text.like(condition)

    def best_candidate(
        self, z: Float[Tensor, "batch candidates dim"], condition: dict[str, Tensor]
    ) -> Float[Tensor, "batch dim"]:
        """Return each caption's candidate with the largest z_i · z_t."""
        text_embedding = self.text_scaling.denormalize(condition["text_embedding"])
        best = torch.einsum("bnd,bd->bn", z, text_embedding).argmax(dim=1)
        return z[torch.arange(len(z), device=z.device), best]
