"""Load a public CLIP of open_clip from a local file or the Hugging Face hub."""

import logging
import os
import pickle
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import open_clip
import torch
from open_clip.factory import load_checkpoint
from open_clip.model import CLIP
from safetensors import SafetensorError
from torch import nn

from unclip.clip.embedder import ClipEmbedder
from unclip.clip.model import clip_fingerprint
from unclip.clip.tokenizer import Tokenizer

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
PROBE_SECONDS = 5.0


def load_public(
    name: str,
    pretrained: str | os.PathLike[str],
    *,
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
) -> ClipEmbedder:
    """Load a public CLIP as a frozen embedder.

    Args:
        name: a model of `open_clip.list_models()` that uses CLIP's tokens, such as "ViT-L-14". For
            a file of OpenAI's weights, use the name with "-quickgelu".
        pretrained: a file of weights (`.safetensors`, or a `.pt`, `.pth` or `.bin` file of plain
            tensors), or a tag of `open_clip.list_pretrained_tags_by_model(name)`, such as "openai",
            which is downloaded from the hub unless it is cached.
        normalize: scale embeddings to unit length; Karlo uses OpenAI's CLIP without.
        dtype: dtype that the model computes in.

    Raises:
        ValueError: the name, tag or kind of file is unknown, the weights do not fit or are not
            plain tensors, or the CLIP uses other tokens.
        FileNotFoundError: the weights are missing and cannot be downloaded; the message has the
            command that downloads them.
    """
    name = name.replace("/", "-")
    settings = _settings(name)
    tag = open_clip.get_pretrained_cfg(name, str(pretrained))
    path = _fetch(name, str(pretrained), tag) if tag else _local_file(name, Path(pretrained))
    logging.disable(logging.WARNING)  # open_clip warns that the weights are random
    try:
        model = open_clip.create_model(
            name,
            load_weights=False,
            pretrained_text=False,
            force_quick_gelu=settings.get("quick_gelu", False) or tag.get("quick_gelu", False),
            force_preprocess_cfg={key: tag[key] for key in ("mean", "std") if key in tag},
        )
    finally:
        logging.disable(logging.NOTSET)
    _load(model, path, name)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    return ClipEmbedder(
        model,
        Tokenizer(cast(int, model.context_length)),
        image_mean=preprocess["mean"],
        image_std=preprocess["std"],
        fingerprint=clip_fingerprint(model.state_dict()),
        normalize=normalize,
        dtype=dtype,
    )


def _settings(name: str) -> dict[str, Any]:
    """Return open_clip's settings of a model that unclip can use."""
    if ":" in name:
        raise ValueError(
            f"{name}: name must be one of open_clip.list_models(), pretrained a file of weights"
        )
    settings = open_clip.get_model_config(name)
    if settings is None:
        raise ValueError(f"open_clip has no model {name!r}; see open_clip.list_models()")
    text = settings["text_cfg"]
    if "hf_model_name" in text or "hf_tokenizer_name" in text or "multimodal_cfg" in settings:
        raise ValueError(
            f"{name} uses a tokenizer or text tower other than CLIP's, which unclip does not "
            "support; use a CLIP such as ViT-B-32, ViT-L-14 or EVA02-L-14"
        )
    return settings


def _local_file(name: str, path: Path) -> Path:
    if path.is_file() and path.suffix in SUFFIXES:
        return path
    tags = open_clip.list_pretrained_tags_by_model(name)
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path} is neither a tag of {name} (it has: {', '.join(tags) or 'none'}) nor a file "
            f"of weights ({', '.join(SUFFIXES)})"
        )
    download = ", or download public weights: " if tags else ""
    if tags:
        download += _command(name, open_clip.get_pretrained_cfg(name, tags[0]))
    raise FileNotFoundError(
        f"the weights of {name} are not at {path}: put the file there{download}"
    )


def _hub_files(tag: dict[str, Any]) -> tuple[str, list[str]]:
    """Return a tag's repository on the hub and its files with the same weights, safest first."""
    repository, _, file = tag["hf_hub"].rpartition("/")
    if not file:  # open_clip's standard names
        return repository, ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    return repository, [str(Path(file).with_suffix(".safetensors")), file]


def _command(name: str, tag: dict[str, Any]) -> str:
    repository, (file, _) = _hub_files(tag)
    folder = f"weights/{name}"
    return (
        f"`hf download {repository} {file} --local-dir {folder}`, then pretrained={folder}/{file}"
    )


def _fetch(name: str, tag_name: str, tag: dict[str, Any]) -> Path:
    """Return a tag's weights from the hub or its cache; without a network, fail in seconds."""
    repository, files = _hub_files(tag)
    for file in files:
        cached = huggingface_hub.try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    reasons = []
    for file in files:
        # Ask for the metadata first, without retries: a download retries for half a minute.
        try:
            url = huggingface_hub.hf_hub_url(repository, file)
            huggingface_hub.get_hf_file_metadata(url, timeout=PROBE_SECONDS)
            return Path(huggingface_hub.hf_hub_download(repository, file))
        except Exception as error:  # the file is missing, or no network: the types are many
            reasons.append(_first_line(error))
    raise FileNotFoundError(
        f"the weights {tag_name} of {name} are missing and cannot be downloaded ({reasons[0]}). "
        "With a network: " + _command(name, tag)
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _load(model: nn.Module, path: Path, name: str) -> None:
    """Load weights as plain tensors; anything that needs unpickling is refused."""
    try:
        load_checkpoint(cast(CLIP, model), str(path), strict=True, weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is damaged or contains more than plain tensors, so it is not loaded "
            f"({_first_line(error)}): use the .safetensors file of the same weights"
        ) from error
    except (RuntimeError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(
            f"{path} does not contain the weights of {name} ({_first_line(error)}): "
            "check the name, or use the .safetensors file of the same weights"
        ) from error
