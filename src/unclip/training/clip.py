"""Training of a CLIP."""

from typing import Any

import torch
from torch import Tensor

from unclip.clip import ClipEmbedder, recall_at
from unclip.training.module import Batch, StageModule


class ClipModule(StageModule):
    """Validates by retrieval: does an image find its caption among others, and a caption its image?

    Args:
        among: candidates of a retrieval; all of the validation's pairs if they are fewer.
        settings: as `StageModule` takes them.
    """

    def __init__(self, *args: Any, among: int = 64, **settings: Any):
        super().__init__(*args, **settings)
        self.among = among
        self._embedder: ClipEmbedder | None = None
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def on_validation_epoch_start(self) -> None:
        """Takes a frozen copy of the averaged weights."""
        self._embedder = self.stage.embedder().to(self.device)

    def measure(self, batch: Batch) -> dict[str, Tensor | float]:
        """Keeps the batch's embeddings for the end of the validation."""
        text = self._embedder.text(batch["caption"]).text_embedding
        self._pairs.append((self._embedder.image(batch["image"]), text))
        return {}

    def on_validation_epoch_end(self) -> None:
        """Logs recall@1 and @5 in both directions, and how many candidates there were."""
        image, text = (torch.cat(parts) for parts in zip(*self._pairs, strict=True))
        self._embedder, self._pairs = None, []
        among = min(self.among, len(image))
        recall = recall_at(image, text, (1, 5), among)
        self.log_dict(
            {f"validation/{name}": value for name, value in recall.items()}, sync_dist=True
        )
        self.log("validation/among", float(among), sync_dist=True)
