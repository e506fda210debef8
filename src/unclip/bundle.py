"""Saves and loads a trained stage: one safetensors file that says how it is built.

Nothing here unpickles, and a recipe from elsewhere can build only what unclip's own model layers
define, no larger than the tensors that lie beside it.
"""

import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from unclip._version import __version__
from unclip.clip import ClipEmbedder, fingerprint
from unclip.stages import ClipStage, Stage

FORMAT = 1
STAGES = ("clip", "prior", "prior_ar", "decoder", "upsampler_256", "upsampler_1024")

# The parts of stages that compute in the dtype that is asked for.
_NETWORKS = ("network.", "last_network.", "text_encoder.", "model.")

# What a recipe from elsewhere may ask for. Nothing in these packages touches files or the network.
_BUILDABLE = ("unclip.diffusion", "unclip.networks", "unclip.stages")
_DEEPEST = 32
_LONGEST_RECIPE = 2**20
_LARGEST_INTEGER = 2**17
_MOST_MODULES = 10_000
_MOST_UNSAVED_BYTES = 2**28


class StageMetadata(NamedTuple):
    """What a stage's file says about itself.

    Attributes:
        stage: the stage's name.
        recipe: the plain dict from which it is built.
        version: the unclip that wrote it.
        steps: optimizer steps that it was trained for.
        clip_fingerprint: of the CLIP that it was trained with or that it is; None if it needs none.
        extra: other plain values, such as scores.
        fingerprint: of the file's own weights.
    """

    stage: str
    recipe: dict[str, Any]
    version: str
    steps: int
    clip_fingerprint: str | None
    extra: dict[str, str | float | int]
    fingerprint: str


def stage_file(folder: str | Path, name: str) -> Path:
    """Where a bundle keeps a stage."""
    return Path(folder) / f"{name}.safetensors"


def train_command(name: str) -> str:
    """What to run for a stage that is missing."""
    return f"python src/train.py stage={name}"


def build(recipe: Mapping[str, Any]) -> Any:
    """Builds what a plain, resolved recipe describes.

    Raises:
        ValueError: for a target outside unclip's model layers, a value that no model needs, and a
            recipe that does not fit its constructors.
    """
    _check_recipe(recipe)
    try:
        return instantiate(dict(recipe), _convert_="all")
    except InstantiationException as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        where = str(error).partition("full_key: ")[2] or "recipe"
        raise ValueError(f"the recipe cannot be built at {where}: {cause}") from error


def save_stage(
    path: str | Path,
    stage: Stage,
    *,
    recipe: Mapping[str, Any],
    steps: int,
    clip_fingerprint: str | None,
    extra: Mapping[str, str | float | int] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a stage's file; until it is whole and on the disk, the old one stays.

    Args:
        path: the file, `models/NAME/STAGE.safetensors`.
        stage: what is saved.
        recipe: what `build` builds the same stage from.
        steps: optimizer steps that it was trained for.
        clip_fingerprint: of the CLIP that it was trained with; a CLIP stage's own is found here.
        extra: plain values to keep beside it.
        state_dict: weights to save in place of the stage's own, such as their averages.

    Raises:
        ValueError: if `load_stage` could not load the file, or if a weight is not finite.
    """
    path = Path(path)
    tensors = _separate(stage.state_dict() if state_dict is None else state_dict)
    _check_fit(path, recipe, {key: _described(tensor) for key, tensor in tensors.items()})
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: not written, since {key} has values that are not finite")
    own = fingerprint(tensors)
    if isinstance(stage, ClipStage):
        clip_fingerprint = own
    elif stage.needs_clip and clip_fingerprint is None:
        raise ValueError(f"{path}: not written, since {stage.name} needs its CLIP's fingerprint")
    try:
        metadata = {
            "unclip_format": str(FORMAT),
            "stage": stage.name,
            "recipe": json.dumps(recipe),
            "version": __version__,
            "steps": str(int(steps)),
            "extra": json.dumps(dict(extra or {})),
            "fingerprint": own,
        }
    except TypeError as error:
        raise ValueError(
            f"{path}: recipe and extra must hold plain values only: {error}"
        ) from error
    if clip_fingerprint is not None:
        metadata["clip_fingerprint"] = clip_fingerprint
    path.parent.mkdir(parents=True, exist_ok=True)
    with _written_beside(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_metadata(path: str | Path) -> StageMetadata:
    """What a stage's file says about itself; no tensor is read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a whole safetensors file that this unclip can read.
    """
    return _read_header(Path(path))[0]


@torch.inference_mode(False)  # the weights outlive the mode that they happen to be loaded under
def load_stage(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Stage:
    """The stage that a file holds, frozen and in eval mode.

    Its sizes are compared with the file's before anything is allocated. On a CPU, in float32, its
    weights are the file's own pages, read from the disk when they are first used; elsewhere they
    are brought over one by one.

    Args:
        path: the file.
        device: where the stage shall lie.
        dtype: of its networks; what scales their inputs and reads their outputs stays float32.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, hostile, too new, or does not fit its recipe.
    """
    path = Path(path)
    metadata, shapes = _read_header(path)
    _check_fit(path, metadata.recipe, shapes)
    with _weightless():
        stage = build(metadata.recipe)
    tensors = {}
    try:
        for key, tensor in load_file(path).items():
            network = key.startswith(_NETWORKS) and tensor.is_floating_point()
            tensors[key] = tensor.to(device, dtype if network else tensor.dtype)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    stage.load_state_dict(tensors, assign=True)
    return stage.to(device).requires_grad_(False).eval()


def weight_bytes(path: str | Path, dtype: torch.dtype = torch.float32) -> int:
    """What a stage takes in memory once `load_stage` has loaded it in `dtype`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged.
    """
    shapes = _read_header(Path(path))[1]
    total = 0
    for key, described in shapes.items():
        kind, _, shape = described.partition(" ")
        network = key.startswith(_NETWORKS) and kind == "float"
        each = dtype.itemsize if network else torch.float32.itemsize
        total += each * math.prod(json.loads(shape))
    return total


@torch.inference_mode(False)
def load_embedder(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ClipEmbedder:
    """The frozen CLIP that a CLIP stage's file holds, computing in `dtype`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as `load_stage`, and if the file holds another stage.
    """
    stage = load_stage(path)
    if not isinstance(stage, ClipStage):
        raise ValueError(f"{path} holds the stage {stage.name}, not a CLIP")
    embedder = stage.embedder(dtype=dtype, share=True)
    written = read_metadata(path).clip_fingerprint
    if embedder.fingerprint != written:
        raise ValueError(
            f"{path} was written as CLIP {written} but its weights are {embedder.fingerprint}: "
            "bring the file back from where it came"
        )
    return embedder.to(device)


def check_start(stage: Stage, path: str | Path) -> None:
    """Compares a stage, on any device, with a file that it is to be initialised from.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming what does not fit.
    """
    path = Path(path)
    metadata, found = _read_header(path)
    if metadata.stage != stage.name:
        raise ValueError(f"{path} holds the stage {metadata.stage}, not {stage.name}")
    wanted = {key: _described(tensor) for key, tensor in stage.state_dict().items()}
    _check_same(path, wanted, found)


def initialise(stage: Stage, path: str | Path, clip_fingerprint: str | None) -> None:
    """Gives a stage the weights of a file, for training to start from.

    Args:
        stage: of the same sizes; what its recipe says else may differ.
        path: a stage's file.
        clip_fingerprint: of the CLIP that the stage will be trained with; None for any.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming what does not fit.
    """
    path = Path(path)
    check_start(stage, path)
    metadata = read_metadata(path)
    known = None not in (clip_fingerprint, metadata.clip_fingerprint)
    if known and clip_fingerprint != metadata.clip_fingerprint:
        raise ValueError(
            f"{path} was trained with CLIP {metadata.clip_fingerprint}, and this run has "
            f"{clip_fingerprint}: take the clip.safetensors beside it"
        )
    stage.load_state_dict(load_file(path))


def _separate(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two in one piece of memory, as safetensors wants them."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in state_dict.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    return tensors


def _described(tensor: Tensor) -> str:
    return f"{'float' if tensor.is_floating_point() else 'integer'} {list(tensor.shape)}"


def _described_in_header(part: Any) -> str:
    return f"{'float' if 'F' in part.get_dtype() else 'integer'} {list(part.get_shape())}"


def _read_header(path: Path) -> tuple[StageMetadata, dict[str, str]]:
    """A file's metadata, and each tensor's kind and shape."""
    if not path.exists():
        known = path.stem in (*STAGES, "judge")
        mend = f"train it with `{train_command(path.stem)}`" if known else "check the path"
        raise FileNotFoundError(f"{path} is missing: {mend}")
    try:
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
            keys = file.keys()
            shapes = {key: _described_in_header(file.get_slice(key)) for key in keys}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}): copy it again or retrain it"
        ) from error
    if "unclip_format" not in texts:
        raise ValueError(f"{path} is a safetensors file but not an unclip stage")
    try:
        written = int(texts["unclip_format"])
        if written <= FORMAT:
            return _parsed(texts), shapes
    except (KeyError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} has damaged metadata ({error!r}): copy it again") from error
    raise ValueError(
        f"{path} has format {written}, and this unclip reads up to {FORMAT}: upgrade unclip"
    )


def _parsed(texts: Mapping[str, str]) -> StageMetadata:
    if len(texts["recipe"]) > _LONGEST_RECIPE:
        raise ValueError("the recipe is too long")
    return StageMetadata(
        stage=texts["stage"],
        recipe=json.loads(texts["recipe"]),
        version=texts["version"],
        steps=int(texts["steps"]),
        clip_fingerprint=texts.get("clip_fingerprint"),
        extra=json.loads(texts["extra"]),
        fingerprint=texts["fingerprint"],
    )


def _check_fit(path: Path, recipe: Mapping[str, Any], found: Mapping[str, str]) -> None:
    """Builds the recipe without memory and compares it with the tensors that a file has."""
    try:
        with torch.device("meta"), _few_modules():
            stage = build(recipe)
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(stage, Stage):
        raise ValueError(f"{path}: the recipe builds a {type(stage).__name__}, not a stage")
    wanted = {key: _described(tensor) for key, tensor in stage.state_dict().items()}
    _check_same(path, wanted, found)
    unsaved = sum(b.nbytes for key, b in stage.named_buffers() if key not in wanted)
    if unsaved > _MOST_UNSAVED_BYTES:
        raise ValueError(
            f"{path}: the recipe builds tables of {unsaved} bytes, which are not believed"
        )


def _check_same(path: Path, wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Compares the tensors that a recipe builds with those that a file has."""
    for kind, keys in (
        ("lacks", wanted.keys() - found.keys()),
        ("has, against its recipe,", found.keys() - wanted.keys()),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{path} {kind} {min(keys)}{more}")
    for key in sorted(wanted):
        if wanted[key] != found[key]:
            raise ValueError(f"{path}: {key} is {found[key]}, and its recipe builds {wanted[key]}")


@contextmanager
def _weightless() -> Iterator[None]:
    """Modules made inside have their tables, but no memory for parameters: a file brings those."""

    def hook(module: nn.Module, name: str, parameter: nn.Parameter | None):
        if parameter is None:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _few_modules() -> Iterator[None]:
    """Stops a construction that makes more modules than any stage has."""
    count = 0

    def hook(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > _MOST_MODULES:
            raise ValueError(f"the recipe builds more than {_MOST_MODULES} modules")

    handle = register_module_module_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _check_recipe(recipe: Any) -> None:
    """Refuses what is not plain, what is out of proportion, and what is not unclip's to build."""
    if not isinstance(recipe, Mapping) or "_target_" not in recipe:
        raise ValueError("a recipe is a dict with a _target_")
    pending = [("recipe", recipe, 0)]
    while pending:
        where, value, depth = pending.pop()
        if depth > _DEEPEST:
            raise ValueError(f"{where}: the recipe is too deep")
        if isinstance(value, dict):
            for key, child in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"{where}: the key {key!r} is not a string")
                if key == "_target_":
                    _check_target(where, child)
                elif key.startswith("_") and key != "_partial_":
                    raise ValueError(f"{where}: the key {key} is not allowed in a recipe")
                pending.append((f"{where}.{key}", child, depth + 1))
        elif isinstance(value, list | tuple):
            pending += [(f"{where}[{i}]", child, depth + 1) for i, child in enumerate(value)]
        elif isinstance(value, str):
            if "${" in value:
                raise ValueError(f"{where}: {value!r} is not resolved")
        elif isinstance(value, int):
            if abs(value) > _LARGEST_INTEGER:
                raise ValueError(f"{where} is {value}, larger than any that a model needs")
        elif not (value is None or isinstance(value, float)):
            raise ValueError(f"{where} is a {type(value).__name__}, not a plain value")


def _check_target(where: str, target: Any) -> None:
    """Accepts a class or function that one of unclip's model layers itself defines."""
    refusal = ValueError(f"{where}: {target!r} is not something that unclip builds")
    if not isinstance(target, str) or not target.startswith(tuple(f"{p}." for p in _BUILDABLE)):
        raise refusal
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise refusal from None
    home = getattr(found, "__module__", "")
    defined = any(home == package or home.startswith(f"{package}.") for package in _BUILDABLE)
    if name.startswith("_") or not isinstance(found, type | FunctionType) or not defined:
        raise refusal


@contextmanager
def _written_beside(path: Path) -> Iterator[Path]:
    """A temporary file in `path`'s folder that takes its name once it is safely on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb"):
            mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files private
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
