"""The batch that loaders make and that stages, LightningModules and callbacks take."""

from typing import TypedDict

from torch import Tensor

UNKNOWN_LABEL = -1  # of a cell that does not count in a loss


class Batch(TypedDict):
    """A batch of N samples; each stage needs and gets only some of these keys.

    Attributes:
        key: names of the samples.
        valid: `N` bool, False for padding that makes the last batches of all ranks equally long.
        caption: raw text.
        image: `N 3 H W`, uint8 from a loader, float in [-1, 1] for a stage.
        low_res: `N 3 h w`, input of an upsampler, as `image`.
        labels: `N maps h w` int64, class of each cell of an image, or UNKNOWN_LABEL.
        image_embedding: `N D`, z_i.
        tokens: `N L` int64, BPE ids of the captions.
        text_states: `N L W`, last hidden states of CLIP's text encoder.
        text_mask: `N L` bool, true at real tokens.
        text_embedding: `N D`, z_t.
    """

    key: list[str]
    valid: Tensor
    caption: list[str]
    image: Tensor
    low_res: Tensor
    labels: Tensor
    image_embedding: Tensor
    tokens: Tensor
    text_states: Tensor
    text_mask: Tensor
    text_embedding: Tensor
