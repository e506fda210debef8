"""Public CLIPs of open_clip's, from a local file or the hub."""

import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import open_clip
import torch
from huggingface_hub.errors import HfHubHTTPError
from open_clip.factory import load_checkpoint
from safetensors import SafetensorError
from torch import nn

from unclip.clip.embedder import ClipEmbedder
from unclip.clip.model import fingerprint
from unclip.clip.tokenizer import Tokenizer

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
PROBE_SECONDS = 5.0


class _HubFile(NamedTuple):
    """Where a tag's weights lie."""

    repository: str
    names: tuple[str, ...]  # the same weights, best first


def load_public(
    name: str,
    pretrained: str | os.PathLike[str],
    *,
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
) -> ClipEmbedder:
    """A public CLIP, frozen.

    Args:
        name: a model of `open_clip.list_models()` with CLIP's own text tokens, such as "ViT-L-14".
            OpenAI's weights need the name with "-quickgelu" when they come from a file; with a tag,
            the tag decides.
        pretrained: a file of weights (`.safetensors`, or `.pt`, `.pth`, `.bin` with nothing but
            tensors in it), or a tag of `open_clip.list_pretrained_tags_by_model(name)`, such as
            "openai", which is fetched from the hub unless its cache has it.
        normalize: unit-length embeddings; OpenAI's CLIP is used without by Karlo.
        dtype: what the model computes in.

    Raises:
        ValueError: for an unknown name, tag or kind of file, for weights that do not fit or that
            would have to be unpickled, and for CLIPs with other tokens than CLIP's.
        FileNotFoundError: when the weights are not here and cannot be fetched; the message says
            what to fetch, and how.
    """
    name = name.replace("/", "-")
    settings = _settings(name)
    tag = open_clip.get_pretrained_cfg(name, str(pretrained))
    path = _fetch(name, str(pretrained), tag) if tag else _local_file(name, Path(pretrained))
    model = open_clip.create_model(
        name,
        load_weights=False,
        pretrained_text=False,
        force_quick_gelu=settings.get("quick_gelu", False) or tag.get("quick_gelu", False),
        force_preprocess_cfg={key: tag[key] for key in ("mean", "std") if key in tag},
    )
    _load(model, path, name)
    preprocess = open_clip.get_model_preprocess_cfg(model)
    return ClipEmbedder(
        model,
        Tokenizer(model.context_length),
        image_mean=preprocess["mean"],
        image_std=preprocess["std"],
        fingerprint=fingerprint(model.state_dict()),
        normalize=normalize,
        dtype=dtype,
    )


def _settings(name: str) -> dict[str, Any]:
    """open_clip's settings of a model, if unclip can use it."""
    if ":" in name:
        raise ValueError(
            f"{name}: give one of open_clip.list_models() as name, a file of weights as pretrained"
        )
    settings = open_clip.get_model_config(name)
    if settings is None:
        raise ValueError(f"open_clip knows no model {name!r}; open_clip.list_models() names them")
    text = settings["text_cfg"]
    if "hf_model_name" in text or "hf_tokenizer_name" in text or "multimodal_cfg" in settings:
        raise ValueError(
            f"{name} reads its text with other tokens or another tower than CLIP's, which unclip "
            "does not; take a CLIP such as ViT-B-32, ViT-L-14 or EVA02-L-14"
        )
    return settings


def _local_file(name: str, path: Path) -> Path:
    if path.suffix not in SUFFIXES:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(
            f"{path} is neither a tag of {name} (it has: {tags}) nor a file of weights "
            f"({', '.join(SUFFIXES)})"
        )
    if not path.is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        fetch = "put the file there"
        if tags:
            fetch += ", or fetch public weights: " + _command(
                name, _hub_file(open_clip.get_pretrained_cfg(name, tags[0]))
            )
        raise FileNotFoundError(f"{path} with the weights of {name} is missing: {fetch}")
    return path


def _hub_file(tag: dict[str, Any]) -> _HubFile:
    repository, _, file = tag["hf_hub"].rpartition("/")
    if not file:  # open_clip's standard names
        return _HubFile(repository, ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"))
    return _HubFile(repository, (str(Path(file).with_suffix(".safetensors")), file))


def _command(name: str, wanted: _HubFile) -> str:
    folder = f"weights/{name}"
    return (
        f"`hf download {wanted.repository} {wanted.names[0]} --local-dir {folder}`, "
        f"then pretrained={folder}/{wanted.names[0]}"
    )


def _fetch(name: str, tag_name: str, tag: dict[str, Any]) -> Path:
    """A tag's weights from the hub or its cache; without a network it fails within seconds."""
    wanted = _hub_file(tag)
    for file in wanted.names:
        cached = huggingface_hub.try_to_load_from_cache(wanted.repository, file)
        if isinstance(cached, str):
            return Path(cached)
    reason = ""
    for file in wanted.names:
        # One question first, without retries: the download itself would try for half a minute.
        try:
            url = huggingface_hub.hf_hub_url(wanted.repository, file)
            huggingface_hub.get_hf_file_metadata(url, timeout=PROBE_SECONDS)
            return Path(huggingface_hub.hf_hub_download(wanted.repository, file))
        except HfHubHTTPError as error:  # the hub answers: the other name may do
            reason = reason or _first_line(error)
        except Exception as error:  # no network, in whichever words the hub's client has for it
            reason = _first_line(error)
            break
    raise FileNotFoundError(
        f"the weights {tag_name} of {name} are not here and cannot be fetched ({reason}). "
        "With a network: " + _command(name, wanted)
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _load(model: nn.Module, path: Path, name: str) -> None:
    """Loads weights as tensors only: what would have to be unpickled is refused."""
    try:
        load_checkpoint(model, str(path), strict=True, weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} does not hold plain tensors, or is damaged, and is not opened "
            f"({_first_line(error)}): take the .safetensors file of the same weights"
        ) from error
    except (RuntimeError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(
            f"{path} does not hold the weights of {name} ({_first_line(error)}): "
            "check the name, or take the .safetensors file of the same weights"
        ) from error
