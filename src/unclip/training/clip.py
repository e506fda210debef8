"""Training of a CLIP."""

import itertools
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
        self._pairs: list[tuple[list[str], Tensor, Tensor]] = []

    def on_validation_epoch_start(self) -> None:
        """Takes a frozen copy of the averaged weights."""
        self._embedder = self.stage.embedder().to(self.device)

    def measure(self, batch: Batch) -> dict[str, Tensor | float]:
        """Keeps the batch's embeddings for the end of the validation."""
        if batch["valid"].all():  # else it is a stand-in of one sample
            image = self._embedder.image(batch["image"]).cpu()
            text = self._embedder.text(batch["caption"]).text_embedding.cpu()
            self._pairs.append((batch["key"], image, text))
        return {}

    def on_validation_epoch_end(self) -> None:
        """Logs recall@1 and @5 in both directions, and how many candidates there were.

        All ranks' pairs are candidates, in the order of their keys: as one process has them.
        """
        found = [self._pairs] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(found, self._pairs)
        keys, image, text = zip(*itertools.chain(*found), strict=True)
        keys = list(itertools.chain(*keys))
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self._embedder, self._pairs = None, []
        among = min(self.among, len(keys))
        recall = recall_at(torch.cat(image)[order], torch.cat(text)[order], (1, 5), among)
        scores = {f"validation/{name}": value for name, value in recall.items()}
        self.log_dict(scores | {"validation/among": float(among)}, sync_dist=True)
