"""open_clip's contrastive loss, without repeated captions among the negatives."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from open_clip.loss import ClipLoss
from torch import Tensor


class Contrast(NamedTuple):
    """The contrastive loss of a batch and its accuracy.

    Attributes:
        loss: differentiable loss.
        image_to_text: share of this process's images whose own caption has the highest score in
            the batch.
        text_to_image: share of this process's captions whose own image has the highest score.
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
    """Return the symmetric cross-entropy of Radford et al. (2021), figure 3.

    Args:
        image_embedding: image embeddings of unit length.
        text_embedding: text embeddings of unit length.
        logit_scale: factor on the cosines (not its logarithm).
        tokens: token ids of the captions; rows with the same tokens are not negatives.
        gather: also use the batches of the other processes, of equal size, as negatives. The mean
            of the gradients over processes is then that of the whole batch.
    """
    ranks = {}
    if gather:
        ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    loss = _PairLoss(tokens, local_loss=gather, gather_with_grad=gather, **ranks)
    value = loss(image_embedding, text_embedding, logit_scale)
    own = loss.get_ground_truth(tokens.device, len(tokens))
    accuracies = [(logits.argmax(1) == own).float().mean() for logits in loss.logits]
    return Contrast(value, *accuracies)


class _PairLoss(ClipLoss):
    """open_clip's loss without repeated captions among the negatives; it stores its logits."""

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

    def _repeated(self) -> Bool[Tensor, "batch rows"]:
        """Return the mask of the other rows, of all processes, with the same caption."""
        tokens = [self.tokens]
        if self.world_size > 1:
            tokens = [torch.empty_like(self.tokens) for _ in range(self.world_size)]
            dist.all_gather(tokens, self.tokens.contiguous())
        _, caption = torch.unique(torch.cat(tokens), dim=0, return_inverse=True)
        own = self.get_ground_truth(self.tokens.device, len(self.tokens))
        same = caption[own][:, None] == caption
        return same.scatter(1, own[:, None], False)  # a caption stays its own positive
