"""A frozen CLIP for the other stages: captions and images in, embeddings out."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn

from unclip.clip.model import encode_text, prepare_image, text_tower
from unclip.clip.tokenizer import Tokenizer
from unclip.device import to_device

CACHE_BYTES = 64 * 2**20


class TextFeatures(NamedTuple):
    """CLIP's features of captions.

    Attributes:
        tokens: token ids, padded with 0.
        text_states: hidden states after the final layer norm.
        text_mask: true at real tokens, including start and end.
        text_embedding: z_t.
    """

    tokens: Int64[Tensor, "batch length"]
    text_states: Float[Tensor, "batch length width"]
    text_mask: Bool[Tensor, "batch length"]
    text_embedding: Float[Tensor, "batch dim"]


class ClipEmbedder:
    """A frozen CLIP: a plain object, never a submodule, with float32 outputs and no gradients.

    On a CPU the features of recent captions are cached, up to 64 MiB.

    Args:
        model: an open_clip model, which is set to eval mode without gradients.
        tokenizer: the model's tokenizer, of the same context length.
        image_mean: mean of each channel in [0, 1] that the model was trained with.
        image_std: standard deviation of each channel that the model was trained with.
        fingerprint: hash of the weights, from `unclip.clip.clip_fingerprint`.
        normalize: scale z_t and z_i to unit length.
        dtype: dtype that the model computes in.

    Attributes:
        embedding_dim: D, width of z_t and z_i.
        text_width: W, width of the text states.
        context_length: L, number of tokens of a caption.
        image_size: side in pixels of the image tower's input; other images are resized.

    Raises:
        ValueError: the CLIP does not take square images.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        fingerprint: str,
        normalize: bool = True,
        dtype: torch.dtype = torch.float32,
    ):
        tower = text_tower(model)
        size = cast(Any, model).visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            raise ValueError(
                f"this CLIP takes {height}×{width} pixels; unclip needs a square input"
            )
        assert tower.positional_embedding.shape[0] == tokenizer.context_length
        assert tower.token_embedding.num_embeddings == tokenizer.vocabulary_size
        self.model = model.to(dtype=dtype).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.fingerprint = fingerprint
        self.normalize = normalize
        self.embedding_dim = _embedding_dim(tower)
        self.text_width = tower.token_embedding.embedding_dim
        self.context_length = tokenizer.context_length
        self.image_size = height
        self._cache: OrderedDict[str, TextFeatures] = OrderedDict()  # one row per caption
        row_bytes = 4 * (self.context_length * (self.text_width + 3) + self.embedding_dim)
        self._cache_size = CACHE_BYTES // row_bytes

    @property
    def device(self) -> torch.device:
        """Return the device of the model and of its outputs."""
        return cast(Tensor, self.model.logit_scale).device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move and convert the model, unless that has been done, and return this embedder."""
        if dtype is not None or torch.device(device) != self.device:
            self.model.to(device, dtype)
        return self

    def drop_image_tower(self) -> None:
        """Free the image tower, which is not needed where image embeddings are stored."""
        cast(Any, self.model).visual = None

    @torch.inference_mode(False)  # cached features may be used under autograd later
    def text(self, captions: Sequence[str]) -> TextFeatures:
        """Encode captions; those longer than the context are truncated (see `tokenizer.cut`)."""
        if self.device.type != "cpu":
            return self._encode_text(captions)
        distinct = list(dict.fromkeys(captions))
        rows = {text: self._cache.pop(text) for text in distinct if text in self._cache}
        new = [caption for caption in distinct if caption not in rows]
        if new:
            features = self._encode_text(new)
            for index, caption in enumerate(new):
                # a copy, so that a cached row does not keep the whole batch in memory
                rows[caption] = TextFeatures(*(part[index].clone() for part in features))
        self._cache.update(rows)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        parts = zip(*(rows[caption] for caption in captions), strict=True)
        return TextFeatures(*(torch.stack(part) for part in parts))

    def image(self, image: Shaped[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Encode images of any size, uint8 or float in [-1, 1], to z_i."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            image = prepare_image(
                image.to(self.device),
                size=self.image_size,
                mean=self.image_mean,
                std=self.image_std,
            )
            dtype = cast(Tensor, self.model.logit_scale).dtype
            return self._finish(cast(Any, self.model).encode_image(image.to(dtype)))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of the batch with CLIP's features.

        The key `caption` adds `tokens`, `text_states`, `text_mask` and `text_embedding`. The key
        `image` adds `image_embedding`, unless the loader has already loaded it.
        """
        batch = dict(batch)
        if "caption" in batch:
            batch |= self.text(batch["caption"])._asdict()
        if "image_embedding" in batch:
            batch["image_embedding"] = batch["image_embedding"].to(self.device, torch.float32)
        elif "image" in batch:
            batch["image_embedding"] = self.image(batch["image"])
        return batch

    def _encode_text(self, captions: Sequence[str]) -> TextFeatures:
        tokens, mask = (to_device(part, self.device) for part in self.tokenizer(captions))
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            states, embedding = encode_text(self.model, tokens)
        return TextFeatures(tokens, states.float(), mask, self._finish(embedding))

    def _finish(self, embedding: Tensor) -> Tensor:
        embedding = embedding.float()
        return F.normalize(embedding, dim=-1) if self.normalize else embedding


def _embedding_dim(tower: Any) -> int:
    projection = tower.text_projection
    if projection is None:
        return tower.token_embedding.embedding_dim
    return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]
