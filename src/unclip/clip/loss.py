"""The contrastive loss: open_clip's, in which a repeated caption is not its own negative."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from open_clip.loss import ClipLoss
from torch import Tensor


class Contrast(NamedTuple):
    """A batch's contrast.

    Attributes:
        loss: differentiable.
        image_to_text: the share of this process's images whose own caption scores best in the
            batch.
        text_to_image: the converse.
    """

    loss: Float[Tensor, ""]
    image_to_text: Float[Tensor, ""]
    text_to_image: Float[Tensor, ""]


def contrastive_loss(
    image_embedding: Float[Tensor, "batch dim"],
    text_embedding: Float[Tensor, "batch dim"],
    logit_scale: Float[Tensor, ""],
    tokens: Int64[Tensor, "batch length"],
    *,
    gather: bool = False,
) -> Contrast:
    """The symmetric cross-entropy of Radford et al. (2021), figure 3, by open_clip.

    Args:
        image_embedding: unit vectors.
        text_embedding: unit vectors.
        logit_scale: the factor on the cosines (not its logarithm).
        tokens: the captions; of two rows with the same tokens neither is a negative of the other.
        gather: take the other processes' batches, which must be as large, as negatives too. The
            mean over processes of the gradients is then the whole batch's.
    """
    process = {}
    if gather:
        process = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    loss = _PairLoss(tokens, local_loss=gather, gather_with_grad=gather, **process)
    value = loss(image_embedding, text_embedding, logit_scale)
    own = loss.get_ground_truth(tokens.device, len(tokens))
    right = [(logits.argmax(1) == own).float().mean() for logits in loss.logits]
    return Contrast(value, *right)


class _PairLoss(ClipLoss):
    """open_clip's loss with repeated captions taken out of the negatives; keeps its logits."""

    def __init__(self, tokens: Tensor, **keywords):
        super().__init__(**keywords)
        self.tokens = tokens
        self.logits: tuple[Tensor, ...] = ()

    def get_logits(self, *arguments, **keywords):
        repeated = self._repeated()
        logits = super().get_logits(*arguments, **keywords)
        logits = tuple(part.masked_fill(repeated, float("-inf")) for part in logits)
        self.logits = tuple(part.detach() for part in logits)
        return logits

    def _repeated(self) -> Bool[Tensor, "batch everyone"]:
        """Where another row, of any process, has the same caption."""
        everyone = [self.tokens]
        if self.world_size > 1:
            everyone = [torch.empty_like(self.tokens) for _ in range(self.world_size)]
            dist.all_gather(everyone, self.tokens.contiguous())
        _, caption = torch.unique(torch.cat(everyone), dim=0, return_inverse=True)
        own = self.get_ground_truth(self.tokens.device, len(self.tokens))
        same = caption[own][:, None] == caption
        return same.scatter(1, own[:, None], False)  # a caption stays its own positive
