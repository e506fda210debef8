"""CLIP through open_clip: tokenizer, model, and a frozen embedder for the other stages."""

from unclip.clip import _open_clip as _open_clip  # isort: skip (before other imports of open_clip)
from unclip.clip.embedder import ClipEmbedder, TextFeatures
from unclip.clip.loss import caption_ids, contrastive_loss, recall_at
from unclip.clip.model import (
    build_clip,
    clip_fingerprint,
    encode_text,
    fingerprint,
    prepare_image,
)
from unclip.clip.public import load_public
from unclip.clip.tokenizer import Tokenizer, Tokens, fit_vocabulary

__all__ = [
    "ClipEmbedder",
    "TextFeatures",
    "Tokenizer",
    "Tokens",
    "build_clip",
    "caption_ids",
    "clip_fingerprint",
    "contrastive_loss",
    "encode_text",
    "fingerprint",
    "fit_vocabulary",
    "load_public",
    "prepare_image",
    "recall_at",
]
