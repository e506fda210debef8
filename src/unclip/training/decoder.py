"""Training of the decoder."""

from torch import Tensor

from unclip.training.module import Batch, StageModule


class DecoderModule(StageModule):
    """Validates by the loss and shows samples beside the pictures that their embeddings are of."""

    def preview(self, batch: Batch) -> dict[str, Tensor]:
        """Validation pictures and what the decoder makes of their embeddings and captions."""
        samples = self.stage.sample(self.stage.condition(batch), generators=self.generators(batch))
        return {"real": batch["image"], "decoded": samples}
