"""Karlo's original files: three checkpoints and the statistics of its CLIP's image embeddings."""

from pathlib import Path
from typing import Any

from torch import Tensor

from unclip.interop.folder import Component, read_tensors

_PROJECTIONS = ("text_seq_proj.", "text_feat_proj.", "clip_tok_proj.", "clip_emb.", "cf_param")


def is_checkpoints(folder: str | Path) -> bool:
    """Whether a folder holds Karlo's own files rather than diffusers' folders."""
    return any(Path(folder).glob("*.ckpt"))


def read_checkpoints(folder: str | Path) -> dict[str, Component]:
    """Karlo's files as the components of diffusers' pipeline, by Karlo's names of tensors.

    They have no config: their sizes are Karlo's.

    Raises:
        FileNotFoundError: naming what is missing.
        ValueError: for a file that is damaged, would have to be unpickled, or holds other modules.
    """
    folder = Path(folder)
    prior, decoder = _one(folder, "prior*.ckpt"), _one(folder, "decoder*.ckpt")
    upsampler, statistics = _one(folder, "improved-sr*.ckpt"), _one(folder, "*stats.th")
    unet, projections = {}, {}
    for key, tensor in _module(decoder, "model").items():
        (projections if key.startswith(_PROJECTIONS) else unet)[key] = tensor
    return {
        "prior": Component(prior, {}, _module(prior, "model") | _statistics(statistics)),
        "decoder": Component(decoder, {}, unet),
        "text_proj": Component(decoder, {}, projections),
        "super_res_first": Component(upsampler, {}, _module(upsampler, "model_first_steps")),
        "super_res_last": Component(upsampler, {}, _module(upsampler, "model_last_step")),
    }


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"{folder / pattern}: exactly one such file is needed, not {names}")
    return found[0]


def _module(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one module of a checkpoint."""
    content: Any = read_tensors(path)
    states = content.get("state_dict") if isinstance(content, dict) else None
    prefix = f"{name}."
    module = {
        key.removeprefix(prefix): tensor
        for key, tensor in (states or {}).items()
        if key.startswith(prefix)
    }
    if not module:
        raise ValueError(f"{path} has no tensors {prefix}… in a state_dict: it is not Karlo's")
    return module


def _statistics(path: Path) -> dict[str, Tensor]:
    """Mean and deviation of image embeddings, as diffusers' prior has them."""
    pair = read_tensors(path)
    if not (isinstance(pair, tuple | list) and [type(part) for part in pair] == [Tensor, Tensor]):
        raise ValueError(f"{path} does not hold a mean and a deviation")
    return {"clip_mean": pair[0][None], "clip_std": pair[1][None]}
