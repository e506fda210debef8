"""Training of the autoregressive prior."""

import torch.nn.functional as F
from torch import Tensor

from unclip.training.module import Batch
from unclip.training.prior import PriorModule


class AutoregressivePriorModule(PriorModule):
    """Validates as any prior, and by what its codes can say at best."""

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Cosines to the true z_i, "cosine_codes" that of the embedding that its own codes give."""
        true = batch["image_embedding"]
        coded = self.stage.decode(self.stage.encode(true))
        return {**super().measure(batch), "cosine_codes": F.cosine_similarity(coded, true).mean()}
