"""What the stages that make an image embedding of a caption share (section 2.2)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unclip.stages.base import Batch, Stage
from unclip.stages.conditioning import NullText, Standardise, text_states


class CaptionStage(Stage):
    """Caption → CLIP image embedding; how is for a subclass to say."""

    needs_clip = True
    text_encoder: nn.Module | None
    text_scaling: Standardise
    null_text: NullText

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """Text states, mask and standardised embedding."""
        return {
            "text_states": text_states(batch, self.text_encoder),
            "text_mask": batch["text_mask"],
            "text_embedding": self.text_scaling(batch["text_embedding"]),
        }

    def null(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """The condition without its caption."""
        return self.null_text.like(condition)

    def nearest(
        self, z: Float[Tensor, "batch candidates dim"], condition: dict[str, Tensor]
    ) -> Float[Tensor, "batch dim"]:
        """Of each caption's candidates the one with the largest z_i · z_t."""
        text_embedding = self.text_scaling.invert(condition["text_embedding"])
        best = torch.einsum("bnd,bd->bn", z, text_embedding).argmax(dim=1)
        return z[torch.arange(len(z), device=z.device), best]
