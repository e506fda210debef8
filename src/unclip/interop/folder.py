"""Folders of diffusers' and transformers' components: a config.json and a file of weights each."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

# By what wrote the component; the first that is there is read.
_FILES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
# Tables that transformers 4 saved with the weights.
_TABLES = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


class Config(dict):
    """A config.json, of which a missing key is an error that names it."""

    def __init__(self, path: Path, content: Mapping[str, Any]):
        super().__init__(content)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.path} lacks {key}")


class Component(NamedTuple):
    """One component of a pipeline.

    Attributes:
        where: its folder, or the checkpoint that it was taken from.
        config: what config.json says.
        tensors: its weights, mapped from the disk where the file allows that.
    """

    where: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def read_component(folder: str | Path, name: str) -> Component:
    """The component `folder/name`.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: for a file that is damaged or would have to be unpickled.
    """
    where = Path(folder) / name
    for file in (where / name for name in _FILES):
        if file.is_file():
            break
    else:
        raise FileNotFoundError(
            f"{where / _FILES[0]} (or {', '.join(_FILES[1:])}) is missing: "
            "the folder is not whole; copy it again"
        )
    tensors = read_tensors(file)
    for key in _TABLES:
        tensors.pop(key, None)
    path = where / "config.json"
    return Component(where, Config(path, read_json(path)), tensors)


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: copy the whole folder again") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error


def read_tensors(path: Path) -> Any:
    """What a file of weights holds, tensors and plain containers only.

    Raises:
        ValueError: if it is damaged or would have to be unpickled.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged or holds more than tensors, and is not opened "
            f"({str(error).splitlines()[0]})"
        ) from error


def write_component(folder: Path, component: Component, file: str) -> None:
    """Writes `folder/component.where`."""
    where = folder / component.where
    where.mkdir(parents=True, exist_ok=True)
    save_file(component.tensors, where / file, metadata={"format": "pt"})
    write_json(where / "config.json", component.config)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, keys sorted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
