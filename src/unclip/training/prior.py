"""Training of the prior."""

import torch.nn.functional as F
from torch import Tensor

from unclip.training.module import Batch, StageModule


class PriorModule(StageModule):
    """Validates by the cosine of predicted to true image embeddings."""

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Cosines to the true z_i.

        "cosine" is the prediction's, "cosine_text" the caption's own z_t's, which a prior has to
        beat, and "cosine_shuffled" that of a prediction from another caption, which shows how much
        of the cosine is the caption's doing.
        """
        predicted = self.stage.sample(
            self.stage.condition(batch), generators=self.generators(batch)
        )
        true = batch["image_embedding"]
        return {
            "cosine": F.cosine_similarity(predicted, true).mean(),
            "cosine_text": F.cosine_similarity(batch["text_embedding"], true).mean(),
            "cosine_shuffled": F.cosine_similarity(predicted.roll(1, dims=0), true).mean(),
        }
