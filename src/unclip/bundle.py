"""Save and load a trained stage: one safetensors file that describes itself.

Loading unpickles nothing, and `unclip.recipes` limits what a file's recipe can build. The functions
raise FileNotFoundError, with the command that trains the stage, if there is no such file, and
ValueError if it is damaged, hostile, or not what they expect.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from unclip._version import __version__
from unclip.clip import ClipEmbedder, fingerprint
from unclip.clip import clip_fingerprint as fingerprint_of_clip
from unclip.files import write_tensors
from unclip.recipes import build, check_recipe, check_tensors, meta_parameters
from unclip.stages import ClipStage, Stage

FORMAT = "1"
STAGES = ("clip", "prior", "prior_ar", "decoder", "upsampler_256", "upsampler_1024")
SIZES = {"decoder": 64, "upsampler_256": 256, "upsampler_1024": 1024}  # pixels of their images

# Submodules of the stages that compute in the requested dtype.
_NETWORKS = ("network.", "last_network.", "text_encoder.", "model.")


class StageMetadata(NamedTuple):
    """The metadata of a stage's file.

    Attributes:
        stage: name of the stage.
        recipe: plain dict that `build` builds the stage from.
        version: version of unclip that wrote the file.
        steps: number of optimizer steps of the training.
        clip_fingerprint: fingerprint of the CLIP used in training, or of the stage itself if it is
            a CLIP; None for a stage that needs no CLIP.
        extra: other plain values, such as validation scores.
        fingerprint: fingerprint of the weights as `load_stage` returns them in float32.
    """

    stage: str
    recipe: dict[str, Any]
    version: str
    steps: int
    clip_fingerprint: str | None
    extra: dict[str, str | float | int]
    fingerprint: str


def stage_file(folder: str | Path, name: str) -> Path:
    """Return the path of a stage's file in a bundle."""
    return Path(folder) / f"{name}.safetensors"


def train_command(name: str) -> str:
    """Return the command that trains a stage."""
    return f"python src/train.py stage={name}"


def missing(path: Path) -> FileNotFoundError:
    """Return the error of a missing stage, with the command that trains it."""
    known = path.stem in (*STAGES, "judge")
    fix = f"train it with `{train_command(path.stem)}`" if known else "check the path"
    return FileNotFoundError(f"{path} is missing: {fix}")


def save_stage(
    path: str | Path,
    stage: Stage,
    *,
    recipe: Mapping[str, Any],
    steps: int,
    clip_fingerprint: str | None,
    extra: Mapping[str, str | float | int] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a stage's file, `models/NAME/STAGE.safetensors`, with `StageMetadata`, atomically.

    The header also has the keys of the ModelSpec standard 1.0.1, which other tools show.

    Args:
        path: the file to write.
        stage: the stage to save.
        recipe: plain dict that `build` builds the same stage from.
        steps: number of optimizer steps of the training.
        clip_fingerprint: fingerprint of the CLIP used in training; a CLIP's own is computed.
        extra: other plain values to store in the metadata, such as the license.
        state_dict: weights to save instead of the stage's own, such as their EMA.
        dtype: dtype of the networks in the file; statistics stay in float32.

    Raises:
        ValueError: if `load_stage` could not load the file, or if a weight is not finite.
    """
    path = Path(path)
    weights = stage.state_dict() if state_dict is None else state_dict
    tensors = _unshared({key: t.to(_dtype(key, t, dtype)) for key, t in weights.items()})
    check_recipe(path, recipe, tensors)
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            fault = f"{key} has values that are not finite in {tensor.dtype}"
            raise ValueError(f"{path} was not written: {fault}")
    loaded = {key: t.to(_dtype(key, t, torch.float32)) for key, t in tensors.items()}
    if isinstance(stage, ClipStage):
        clip_fingerprint = fingerprint_of_clip(loaded)
    elif stage.needs_clip and clip_fingerprint is None:
        raise ValueError(f"{path} was not written: {stage.name} needs its CLIP's fingerprint")
    metadata = {
        "unclip_format": FORMAT,
        "stage": stage.name,
        "recipe": json.dumps(recipe),
        "version": __version__,
        "steps": str(int(steps)),
        "extra": json.dumps(dict(extra or {})),
        "fingerprint": fingerprint(loaded),
        **_modelspec(path, stage, extra or {}),
    }
    if clip_fingerprint is not None:
        metadata["clip_fingerprint"] = clip_fingerprint
    write_tensors(path, tensors, metadata)


def read_metadata(path: str | Path) -> StageMetadata:
    """Read the metadata of a stage's file, without its tensors."""
    return _read_header(Path(path))[0]


@torch.inference_mode(False)  # weights loaded in inference mode can be used outside it, too
def load_stage(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Stage:
    """Load a stage, frozen and in eval mode, with networks in `dtype`; all else stays in float32.

    The recipe's sizes are compared with the file's before any memory is allocated.
    """
    path = Path(path)
    metadata, found = _read_header(path)
    check_recipe(path, metadata.recipe, found)
    with meta_parameters():
        stage = build(metadata.recipe)
    tensors = {}
    try:
        for key, tensor in load_file(path).items():
            # Always a copy: the alignment of a mapped tensor depends on the length of the file's
            # header, and the CPU's kernels round differently for another alignment.
            tensors[key] = tensor.to(device, _dtype(key, tensor, dtype), copy=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    stage.load_state_dict(tensors, assign=True)
    if torch.device(device).type == "cuda":  # cuDNN would convert the weights at each call
        cast(Any, stage).to(memory_format=torch.channels_last)
    return stage.to(device).requires_grad_(False).eval()


def weight_bytes(path: str | Path, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes of memory that `load_stage` needs for a stage's weights in `dtype`."""
    tensors = _read_header(Path(path))[1]
    return sum(t.numel() * _dtype(key, t, dtype).itemsize for key, t in tensors.items())


@torch.inference_mode(False)
def load_embedder(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ClipEmbedder:
    """Load the frozen CLIP of a CLIP stage's file, after checking its fingerprint."""
    stage = load_stage(path)
    if not isinstance(stage, ClipStage):
        raise ValueError(f"{path} holds the stage {stage.name}, not a CLIP")
    embedder = stage.embedder(dtype=dtype, share=True)
    expected = read_metadata(path).clip_fingerprint
    if embedder.fingerprint != expected:
        raise ValueError(
            f"{path} was written with the CLIP fingerprint {expected}, but its weights have "
            f"{embedder.fingerprint}: copy the file again"
        )
    return embedder.to(device)


def check_init(stage: Stage, path: str | Path) -> StageMetadata:
    """Check that a stage, on any device, can be initialized from a file; return its metadata."""
    path = Path(path)
    metadata, found = _read_header(path)
    if metadata.stage != stage.name:
        raise ValueError(f"{path} holds the stage {metadata.stage}, not {stage.name}")
    check_tensors(path, stage.state_dict(), found)
    return metadata


def initialize(stage: Stage, path: str | Path, clip_fingerprint: str | None) -> None:
    """Load the weights of a file into a stage of the same sizes, as the start of its training.

    They must belong to the CLIP of the training; `clip_fingerprint` None accepts any.
    """
    expected = check_init(stage, path).clip_fingerprint
    if None not in (clip_fingerprint, expected) and clip_fingerprint != expected:
        raise ValueError(
            f"{path} was trained with CLIP {expected}, but this run uses {clip_fingerprint}: "
            "use the clip.safetensors from the same folder"
        )
    stage.load_state_dict(load_file(path))


def _modelspec(path: Path, stage: Stage, extra: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys of https://github.com/Stability-AI/ModelSpec that apply to a stage."""
    keys = {
        "sai_model_spec": "1.0.1",
        "architecture": f"unclip-{stage.name.replace('_', '-')}",
        "implementation": "unclip",
        "implementation_version": __version__,
        "title": f"{path.parent.name} {path.stem}",
        "description": f"The stage {path.stem} of a DALL·E 2 (unCLIP).",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "license": extra.get("license"),
        "resolution": "{0}x{0}".format(SIZES[stage.name]) if stage.name in SIZES else None,
    }
    return {f"modelspec.{key}": value for key, value in keys.items() if value is not None}


def _dtype(key: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a stage's tensor if its networks have `dtype`."""
    return dtype if key.startswith(_NETWORKS) and tensor.is_floating_point() else tensor.dtype


def _unshared(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to contiguous CPU memory that no two of them share, as safetensors requires."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in state_dict.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    return tensors


def _read_header(path: Path) -> tuple[StageMetadata, dict[str, Tensor]]:
    """Read a file's metadata, and its tensors' shapes as float32 or int64 tensors on meta."""
    if not path.exists():
        raise missing(path)
    tensors = {}
    try:
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                dtype = torch.float32 if "F" in part.get_dtype() else torch.int64
                tensors[key] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}): copy it again or retrain it"
        ) from error
    written = texts.get("unclip_format")
    if written is None:
        raise ValueError(f"{path} is a safetensors file but not an unclip stage")
    if written != FORMAT:
        raise ValueError(f"{path} has format {written}, but this unclip reads format {FORMAT}")
    try:
        metadata = StageMetadata(
            stage=texts["stage"],
            recipe=json.loads(texts["recipe"]),
            version=texts["version"],
            steps=int(texts["steps"]),
            clip_fingerprint=texts.get("clip_fingerprint"),
            extra=json.loads(texts["extra"]),
            fingerprint=texts["fingerprint"],
        )
        return metadata, tensors
    except (KeyError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} has damaged metadata ({error!r}): copy it again") from error
