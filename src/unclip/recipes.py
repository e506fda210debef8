"""Build stages from recipes, and compare them with the tensors of a file.

A recipe is a plain dict. Its `_target_` is a key of `CONSTRUCTORS`, and its other keys are that
constructor's arguments. Nothing is imported by name, so a recipe from an untrusted file can build
unclip's own models and execute nothing else.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from unclip import diffusion, networks, stages
from unclip.stages import Stage

_NAMES = {
    stages: "AutoregressivePriorStage ClipStage DecoderStage PriorStage UpsamplerStage",
    networks: "ARTransformer PriorTransformer TextTransformer UNet",
    diffusion: "GaussianDiffusion LogitNormal ddim ddpm unipc dpm_solver_pp_2m "
    "dpm_solver_pp_2m_sde",
}
CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    f"{package.__name__}.{name}": getattr(package, name)
    for package, names in _NAMES.items()
    for name in names.split()
}
# Larger than any size or number of steps of a model. The tensors of a file contradict a wrong size,
# but not a wrong number of diffusion steps: this bound keeps its tables below a few megabytes.
MAX_INTEGER = 2**17
# A recipe is refused while it is built if it has more parameters than this per tensor of its file,
# so that a huge number of layers takes no time. Recipes that differ by less get a better message.
MAX_PARAMETERS = 10


def build(recipe: Mapping[str, Any]) -> Any:
    """Build the object that a plain, resolved recipe describes.

    Raises:
        ValueError: naming the part of the recipe that is not plain data, or cannot be built.
    """
    if not isinstance(recipe, Mapping) or "_target_" not in recipe:
        raise ValueError("a recipe is a dict with a _target_")
    return _build_part("recipe", recipe)


def _build_part(where: str, part: Any) -> Any:
    if isinstance(part, list | tuple):
        return [_build_part(f"{where}[{i}]", child) for i, child in enumerate(part)]
    if not isinstance(part, dict):
        if not (part is None or isinstance(part, str | int | float)):
            raise ValueError(f"{where} is a {type(part).__name__}, not a plain value")
        if isinstance(part, int) and abs(part) > MAX_INTEGER:
            raise ValueError(f"{where} is {part}, larger than any size that a model needs")
        return part
    arguments = {key: _build_part(f"{where}.{key}", child) for key, child in part.items()}
    if "_target_" not in part:
        return arguments
    target, is_partial = arguments.pop("_target_"), arguments.pop("_partial_", False)
    if not isinstance(target, str) or target not in CONSTRUCTORS:
        raise ValueError(f"{where}: {target!r} is not something that unclip builds")
    constructor = CONSTRUCTORS[target]
    try:
        return partial(constructor, **arguments) if is_partial else constructor(**arguments)
    except Exception as error:
        raise ValueError(f"{where} cannot be built: {error}") from error


def check_recipe(path: Path, recipe: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a recipe builds no stage, or one with other tensors than its file.

    No memory is allocated. `found` has the file's tensors, on any device.
    """
    try:
        with torch.device("meta"), meta_parameters(MAX_PARAMETERS * len(found)):
            stage = build(recipe)
    except Exception as error:  # also a RecursionError of nested lists
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(stage, Stage):
        raise ValueError(f"{path}: the recipe builds a {type(stage).__name__}, not a stage")
    check_tensors(path, stage.state_dict(), found)


def check_tensors(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming a file's tensor that is missing, unexpected, or of another shape."""
    check_names(path, expected.keys(), found.keys())
    for key in sorted(expected):
        ours, theirs = _kind_and_shape(expected[key]), _kind_and_shape(found[key])
        if ours != theirs:
            raise ValueError(f"{path}: {key} is {theirs}, but the model's is {ours}")


def _kind_and_shape(tensor: Tensor) -> str:
    return f"{'float' if tensor.is_floating_point() else 'integer'} {list(tensor.shape)}"


def check_names(path: Path, expected: Set[str], found: Set[str]) -> None:
    """Raise ValueError naming a file's tensor that is missing or unexpected."""
    problems = {"lacks": expected - found, "has an unexpected tensor": found - expected}
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{path} {problem} {min(names)}{more}")


@contextmanager
def meta_parameters(limit: float = math.inf) -> Iterator[None]:
    """Create the parameters of new modules on the meta device, and their buffers as usual.

    Raises:
        ValueError: as soon as there are more than `limit` parameters.
    """
    count = itertools.count(1)

    def hook(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None:
            return None
        if next(count) > limit:
            raise ValueError("it has many more parameters than the file")
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    # torch's annotation omits the new parameter that a hook may return
    handle = register_module_parameter_registration_hook(cast(Callable[..., None], hook))
    try:
        yield
    finally:
        handle.remove()
