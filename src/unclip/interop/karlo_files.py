"""Read Karlo's weights: diffusers' component folders, or the three original checkpoints.

The functions raise FileNotFoundError for a missing file, and ValueError for one that is damaged, of
another model, or contains more than tensors; both name the file.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# The first of these that a component's folder contains is read.
_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
# Tables that transformers 4 saved with the weights.
_TABLES = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
# The decoder checkpoint's tensors that are another component in diffusers.
_PROJECTIONS = ("text_seq_proj.", "text_feat_proj.", "clip_tok_proj.", "clip_emb.", "cf_param")


class Component(NamedTuple):
    """One component of a pipeline.

    Attributes:
        source: its folder, or the checkpoint that contains it.
        tensors: its weights, memory-mapped if the file allows it.
    """

    source: Path
    tensors: dict[str, Tensor]


def read_component(folder: Path, name: str) -> Component:
    """Read the component `folder/name`."""
    source = folder / name
    file = next((source / name for name in _WEIGHTS if (source / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{source / _WEIGHTS[0]} (or {', '.join(_WEIGHTS[1:])}) is missing: "
            "copy the whole folder again"
        )
    return Component(
        source, {key: t for key, t in _read_tensors(file).items() if key not in _TABLES}
    )


def has_checkpoints(folder: Path) -> bool:
    """Return whether a folder contains Karlo's checkpoints instead of diffusers' components."""
    return any(folder.glob("*.ckpt"))


def read_checkpoints(folder: Path) -> dict[str, Component]:
    """Read Karlo's checkpoints as the components of diffusers' pipeline, with Karlo's names."""
    prior, decoder = _find_file(folder, "prior*.ckpt"), _find_file(folder, "decoder*.ckpt")
    upsampler, statistics = _find_file(folder, "improved-sr*.ckpt"), _find_file(folder, "*stats.th")
    unet, projections = {}, {}
    for key, tensor in _read_module(decoder, "model").items():
        (projections if key.startswith(_PROJECTIONS) else unet)[key] = tensor
    prior_tensors = _read_module(prior, "model") | _read_statistics(statistics)
    return {
        "prior": Component(prior, prior_tensors),
        "decoder": Component(decoder, unet),
        "text_proj": Component(decoder, projections),
        "super_res_first": Component(upsampler, _read_module(upsampler, "model_first_steps")),
        "super_res_last": Component(upsampler, _read_module(upsampler, "model_last_step")),
    }


def _find_file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"{folder} must have exactly one {pattern}, but has {names}")
    return found[0]


def _read_module(path: Path, name: str) -> dict[str, Tensor]:
    """Read the tensors of one module of a checkpoint."""
    content: Any = _read_tensors(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    prefix = f"{name}."
    state = {key: tensor for key, tensor in (state or {}).items() if key.startswith(prefix)}
    if not state:
        raise ValueError(f"{path} is not Karlo's: it has no state_dict with tensors {prefix}…")
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()}


def _read_statistics(path: Path) -> dict[str, Tensor]:
    """Read mean and standard deviation of image embeddings, by the names of diffusers' prior."""
    pair = _read_tensors(path)
    if not (isinstance(pair, tuple | list) and [type(part) for part in pair] == [Tensor, Tensor]):
        raise ValueError(f"{path} does not contain a mean and a standard deviation")
    return {"clip_mean": pair[0][None], "clip_std": pair[1][None]}


def _read_tensors(path: Path) -> Any:
    """Read tensors and plain containers from a file, without unpickling anything else."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged or contains more than tensors, and was not loaded "
            f"({str(error).splitlines()[0]})"
        ) from error
