"""CLIP as a trainable stage: contrastive learning on image–caption pairs (Radford et al. 2021)."""

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unclip.batch import Batch
from unclip.clip import (
    ClipEmbedder,
    Tokenizer,
    build_clip,
    caption_ids,
    clip_fingerprint,
    contrastive_loss,
    encode_text,
    fit_vocabulary,
    prepare_image,
)
from unclip.device import to_device
from unclip.networks.layers import has_slow_attention
from unclip.stages.base import Stage

MAX_LOG_SCALE = math.log(100)  # bound on the logarithm of the logit scale (Radford et al. 2021)
CAPTION_BATCHES = 1000  # batches whose captions the vocabulary is fitted to
LENGTH_STEP = 8  # captions are cut behind the batch's last end token, at a multiple of this


class ClipStage(Stage):
    """open_clip's CLIP, trained from scratch.

    Twins of a scene in the same batch are hard negatives of each other. Rows with the same caption
    are not negatives of each other.

    Args:
        embed_dim: D, width of the joint embedding space.
        image_size: side in pixels of the image tower's input; images are resized to it.
        patch_size: side in pixels of a ViT's patches.
        vision_width: width of the image tower.
        vision_layers: number of blocks of a ViT, or of each of the four stages of a ResNet. For a
            ResNet, `vision_width` is the width of the stem, and `patch_size` is unused.
        vision_head_width: width of the image tower's attention heads.
        text_width: W, width of the text tower.
        text_layers: number of blocks of the text tower.
        text_heads: number of attention heads of the text tower.
        context_length: L, number of tokens of a caption, including start and end; longer captions
            are truncated.
        vocabulary_size: size of a vocabulary fitted to the captions; None is all of CLIP's 49,408
            tokens.
        normalize: scale the embedder's outputs to unit length.
        quick_gelu: use OpenAI's activation, which its weights need.
        image_mean: mean of each channel in [0, 1] that the images are normalized with.
        image_std: standard deviation of each channel that the images are normalized with.
    """

    name = "clip"
    needs_clip = False
    vocabulary: Tensor | None

    def __init__(
        self,
        *,
        embed_dim: int,
        image_size: int,
        patch_size: int,
        vision_width: int,
        vision_layers: int | Sequence[int],
        text_width: int,
        text_layers: int,
        text_heads: int,
        vision_head_width: int = 64,
        context_length: int = 77,
        vocabulary_size: int | None = None,
        normalize: bool = True,
        quick_gelu: bool = False,
        image_mean: Sequence[float] = OPENAI_DATASET_MEAN,
        image_std: Sequence[float] = OPENAI_DATASET_STD,
    ):
        super().__init__()
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        vocabulary = None if vocabulary_size is None else fit_vocabulary((), vocabulary_size)
        # CLIP's token ids; `tokenizer` follows this buffer, also after loading a state dict
        self.register_buffer("vocabulary", None if vocabulary is None else torch.tensor(vocabulary))
        self._tokenizer = Tokenizer(context_length, vocabulary)
        self._read: tuple[Tensor | None, int] = (None, 0)  # the vocabulary read last, its version
        self.model = build_clip(
            embed_dim=embed_dim,
            vision={
                "image_size": image_size,
                "patch_size": patch_size,
                "width": vision_width,
                "layers": vision_layers,
                "head_width": vision_head_width,
            },
            text={
                "context_length": context_length,
                "vocab_size": self._tokenizer.vocabulary_size,
                "width": text_width,
                "layers": text_layers,
                "heads": text_heads,
            },
            quick_gelu=quick_gelu,
        )
        self.image_size = image_size
        self.normalize = normalize
        self.quick_gelu = quick_gelu

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the fitted vocabulary."""
        buffer = self.vocabulary
        if buffer is not None:
            read, version = self._read
            if buffer is not read or buffer._version != version:  # reading it makes a GPU wait
                self._read = buffer, buffer._version
                vocabulary = tuple(buffer.tolist())
                self._tokenizer = Tokenizer(self._tokenizer.context_length, vocabulary)
        return self._tokenizer

    def fit_vocabulary(self, captions: Iterable[str]) -> None:
        """Keep the most frequent tokens of these captions, unless the vocabulary is CLIP's."""
        if self.vocabulary is not None:
            kept = fit_vocabulary(captions, len(self.vocabulary))
            self.vocabulary.copy_(torch.tensor(kept))

    def fit_statistics(self, batches: Iterable[Batch]) -> None:
        """Fit the vocabulary to the captions of the first batches."""
        first = islice(batches, CAPTION_BATCHES)
        self.fit_vocabulary(caption for batch in first for caption in batch["caption"])

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the contrastive loss of a batch's images and captions.

        In distributed training the pairs of all processes are negatives, so the batch size must be
        the same in every process.
        """
        if self.training:
            with torch.no_grad():
                self.model.logit_scale.clamp_(max=MAX_LOG_SCALE)
        image, text, captions = self.encode(batch)
        with torch.autocast(image.device.type, enabled=False):
            scale = self.model.logit_scale.exp()
            gather = self.training and dist.is_available() and dist.is_initialized()
            contrast = contrastive_loss(image, text, scale, captions, gather=gather)
        return {
            "loss": contrast.loss,
            "image_to_text": contrast.image_to_text,
            "text_to_image": contrast.text_to_image,
            "logit_scale": scale.detach(),
        }

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit z_i and z_t of each row in float32, and a number that its caption has."""
        tokens, mask = self.tokenizer(batch["caption"])
        length = min(tokens.shape[1], -int(mask.sum(1).max()) // LENGTH_STEP * -LENGTH_STEP)
        image = prepare_image(
            batch["image"], size=self.image_size, mean=self.image_mean, std=self.image_std
        )
        captions = to_device(caption_ids(tokens), image.device)
        # attention is causal, so tokens after the last end token need not be computed
        tokens = to_device(tokens[:, :length], image.device)
        with _attention(image):
            z_i = self.model.encode_image(image)
            z_t = encode_text(self.model, tokens).text_embedding
        return F.normalize(z_i.float(), dim=-1), F.normalize(z_t.float(), dim=-1), captions

    @torch.inference_mode(False)
    def embedder(self, dtype: torch.dtype = torch.float32, *, share: bool = False) -> ClipEmbedder:
        """Return this CLIP as a frozen embedder for the other stages.

        Args:
            dtype: dtype that the embedder computes in.
            share: share the weights instead of copying them, so that later training changes them.
        """
        return ClipEmbedder(
            self.model if share else copy.deepcopy(self.model),
            self.tokenizer,
            image_mean=self.image_mean,
            image_std=self.image_std,
            fingerprint=clip_fingerprint(self.state_dict()),
            normalize=self.normalize,
            dtype=dtype,
        )


def _attention(image: Tensor) -> AbstractContextManager[object]:
    """Choose the attention of the towers: on a CPU in bfloat16, the fused one's backward is slow.

    At 65 tokens it takes three times as long as that of matrix products, a third of a step's time.
    """
    slow = torch.is_autocast_enabled("cpu") and has_slow_attention(image)
    return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()
