"""Training of the prior."""

import torch.nn.functional as F
from torch import Tensor

from unclip.training.module import Batch, StageModule


class PriorModule(StageModule):
    """Validates by the cosine of predicted to true image embeddings, beside cheap predictions."""

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Cosines to the true z_i.

        "cosine" is the prediction's. What it has to beat: "cosine_text", the caption's own z_t
        taken for z_i, and "cosine_linear", one linear layer's, where the stage has it.
        "cosine_shuffled" is that of a prediction from another caption, which shows how much of the
        cosine is the caption's doing.
        """
        true, condition = batch["image_embedding"], self.stage.condition(batch)
        predicted = self.stage.sample(condition, generators=self.generators(batch))
        predictions = {
            "cosine": predicted,
            "cosine_text": batch["text_embedding"],
            "cosine_shuffled": predicted.roll(1, dims=0),
        }
        if self.stage.linear is not None:
            predictions["cosine_linear"] = self.stage.linear(condition["text_embedding"])
        return {name: F.cosine_similarity(z, true).mean() for name, z in predictions.items()}
