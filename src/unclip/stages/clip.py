"""CLIP as a trainable stage: image–caption pairs, contrastively (Radford et al. 2021)."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from unclip.clip import (
    ClipEmbedder,
    Tokenizer,
    build_clip,
    contrastive_loss,
    encode_text,
    fingerprint,
    fit_vocabulary,
    prepare_image,
)
from unclip.stages.base import Batch, Stage

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
LARGEST_LOGIT_SCALE = math.log(100)
LENGTH_STEP = 8


class ClipStage(Stage):
    """open_clip's CLIP, trained from scratch.

    Swapped twins of a scene are hard negatives of each other simply by standing in one batch. Rows
    with the same caption are no negatives of each other.

    Args:
        embed_dim: D, of the joint space.
        image_size: edge of the images that the tower takes; a batch's are resized to it.
        patch_size: edge of a ViT's patches.
        vision_width: of the image tower.
        vision_layers: blocks of a ViT, or the four stages' blocks of a ResNet, whose `vision_width`
            is that of its stem and whose `patch_size` is not used.
        vision_head_width: width of an attention head.
        text_width: W, of the text tower.
        text_layers: its blocks.
        text_heads: its attention heads.
        context_length: L, tokens of a caption, start and end included; longer captions are cut.
        vocabulary_size: of a vocabulary fitted to the captions; all of CLIP's 49,408 tokens when
            None.
        image_mean: of each channel in [0, 1], what the tower's input is standardised with.
        image_std: likewise.
        normalize: whether the embedder scales embeddings to unit length.
        quick_gelu: OpenAI's activation, for its weights.
    """

    name = "clip"
    needs_clip = False

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
        image_mean: Sequence[float] = OPENAI_MEAN,
        image_std: Sequence[float] = OPENAI_STD,
        normalize: bool = True,
        quick_gelu: bool = False,
    ):
        super().__init__()
        vocabulary = None if vocabulary_size is None else fit_vocabulary((), vocabulary_size)
        # Ids of CLIP's. The tokenizer follows this buffer, however it came to change.
        self.register_buffer("vocabulary", None if vocabulary is None else torch.tensor(vocabulary))
        self._tokenizer = Tokenizer(context_length, vocabulary)
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
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.normalize = normalize
        self.quick_gelu = quick_gelu

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer over the fitted vocabulary."""
        if self.vocabulary is not None:
            vocabulary = tuple(self.vocabulary.tolist())
            if vocabulary != self._tokenizer.vocabulary:
                self._tokenizer = Tokenizer(self._tokenizer.context_length, vocabulary)
        return self._tokenizer

    def fit_vocabulary(self, captions: Iterable[str]) -> None:
        """Keeps the tokens most frequent in these captions, unless all of CLIP's are kept."""
        if self.vocabulary is not None:
            kept = fit_vocabulary(captions, len(self.vocabulary))
            self.vocabulary.copy_(torch.tensor(kept))

    def fit_statistics(self, batches: Iterable[Batch]) -> None:
        """The vocabulary, of each batch's "captions" (all of a picture's) or else its "caption"."""
        if self.vocabulary is not None:
            self.fit_vocabulary(caption for batch in batches for caption in _captions(batch))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The contrastive loss of a batch's images and captions.

        In distributed training every process's pairs are negatives, so batches must be equally
        large.
        """
        tokens, mask = self.tokenizer(batch["caption"])
        length = min(tokens.shape[1], -int(mask.sum(1).max()) // LENGTH_STEP * -LENGTH_STEP)
        image = prepare_image(
            batch["image"], size=self.image_size, mean=self.image_mean, std=self.image_std
        )
        tokens = tokens.to(image.device)
        if self.training:
            with torch.no_grad():
                self.model.logit_scale.clamp_(max=LARGEST_LOGIT_SCALE)
        image_embedding = self.model.encode_image(image)
        # The attention is causal: what stands behind the end tokens need not be computed.
        text_embedding = encode_text(self.model, tokens[:, :length]).text_embedding
        with torch.autocast(image.device.type, enabled=False):
            scale = self.model.logit_scale.exp()
            contrast = contrastive_loss(
                F.normalize(image_embedding.float(), dim=-1),
                F.normalize(text_embedding.float(), dim=-1),
                scale,
                tokens,
                gather=self.training and dist.is_available() and dist.is_initialized(),
            )
        return {
            "loss": contrast.loss,
            "image_to_text": contrast.image_to_text,
            "text_to_image": contrast.text_to_image,
            "logit_scale": scale.detach(),
        }

    @torch.inference_mode(False)
    def embedder(self, dtype: torch.dtype = torch.float32, *, share: bool = False) -> ClipEmbedder:
        """This CLIP, frozen, as the other stages use it.

        It is a copy, which training on does not change, unless it is to `share` the weights.
        """
        return ClipEmbedder(
            self.model if share else copy.deepcopy(self.model),
            self.tokenizer,
            image_mean=self.image_mean,
            image_std=self.image_std,
            fingerprint=fingerprint(self.state_dict()),
            normalize=self.normalize,
            dtype=dtype,
        )


def _captions(batch: Batch) -> Iterator[str]:
    """A batch's captions, listed flat or by picture."""
    for item in batch["captions"] if "captions" in batch else batch["caption"]:
        yield from (item,) if isinstance(item, str) else item
