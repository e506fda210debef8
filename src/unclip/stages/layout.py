"""An auxiliary loss that teaches a U-Net what is where in the image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from unclip.batch import UNKNOWN_LABEL


class LayoutHead(nn.Module):
    """Classify each position of a U-Net's features; used in training only.

    The diffusion loss says little about which object is where, so a caption of two objects is
    learned slowly. The labels say it directly, at every noise level.

    Args:
        channels: number of channels of the features.
        classes: number of classes of each map of labels.
        hidden: number of hidden channels.
    """

    def __init__(self, channels: int, classes: Sequence[int], hidden: int = 128):
        super().__init__()
        self.classes = list(classes)
        self.norm = nn.GroupNorm(1, channels)  # a trained network's features may be large
        self.hidden = nn.Conv2d(channels, hidden, 1)
        self.out = nn.Conv2d(hidden, sum(self.classes), 1)

    def forward(
        self,
        features: Float[Tensor, "batch channels side side"],
        labels: Int64[Tensor, "batch maps side side"] | None,
    ) -> Tensor:
        """Return the cross-entropy, summed over the maps; 0 if there are no labels.

        It is the mean over the cells whose label is not UNKNOWN_LABEL.

        Raises:
            ValueError: the labels have another number of maps or another size.
        """
        logits = self.out(F.silu(self.hidden(self.norm(features)))).float()
        if labels is None:
            return 0.0 * logits.sum()
        expected = len(logits), len(self.classes), *logits.shape[2:]
        if labels.shape != expected:
            raise ValueError(f"labels of {tuple(labels.shape)}; the layout head has {expected}")
        known = (labels != UNKNOWN_LABEL).sum().clamp(min=1) / len(self.classes)
        parts = zip(logits.split(self.classes, dim=1), labels.unbind(1), strict=True)
        sums = [
            F.cross_entropy(*part, ignore_index=UNKNOWN_LABEL, reduction="sum") for part in parts
        ]
        return torch.stack(sums).sum() / known
