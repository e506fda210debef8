"""A folder of generated pictures: a PNG a prompt, named by its id, and what they were made with."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from unclip.evaluation.protocol import Prompt, Protocol
from unclip.evaluation.sources import open_image, prepare
from unclip.images import to_pil

MANIFEST, SETTINGS = "manifest.jsonl", "settings.json"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Generated(NamedTuple):
    """One picture of a folder."""

    id: str
    path: Path
    prompt: str | None  # None where no manifest says it
    seed: int | None


class PictureFolder:
    """Generated pictures, ours or anybody's.

    Attributes:
        path: the folder.
        rows: every picture that it has, or shall have.
        settings: what they were made with; {} where nothing says it.
    """

    def __init__(self, path: Path, rows: Sequence[Generated], settings: Mapping[str, Any]) -> None:
        self.path = path
        self.rows = list(rows)
        self.settings = dict(settings)

    @classmethod
    def create(
        cls, path: Path, prompts: Sequence[Prompt], settings: Mapping[str, Any], *, seed: int
    ) -> "PictureFolder":
        """A folder for the pictures of `prompts`, picture k with seed `seed` + k; maybe begun.

        Raises:
            ValueError: it holds pictures of other prompts or settings.
        """
        rows = [
            Generated(prompt.id, path / f"{prompt.id}.png", prompt.text, seed + k)
            for k, prompt in enumerate(prompts)
        ]
        lines = [{"id": row.id, "prompt": row.prompt, "seed": row.seed} for row in rows]
        texts = {
            MANIFEST: "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
            SETTINGS: json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n",
        }
        path.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            file = path / name
            if not file.exists():
                write_beside(file, text.encode())
            elif file.read_text(encoding="utf-8") != text:
                raise ValueError(
                    f"{file} was written with other settings: give another out=, or remove {path}"
                )
        return cls(path, rows, settings)

    @classmethod
    def read(cls, path: Path) -> "PictureFolder":
        """Anybody's pictures: those that manifest.jsonl names, else all, sorted by name.

        Each line of a manifest is {"id": …, "prompt": …}; the picture of ID is ID.png (or .jpg,
        .webp), or what "file" says.

        Raises:
            FileNotFoundError: there is no such folder, no picture, or not one that is named.
            ValueError: the manifest is damaged.
        """
        if not path.is_dir():
            raise FileNotFoundError(f"generated={path}: there is no such folder")
        found = {file.stem: file for file in sorted(path.iterdir()) if _is_picture(file)}
        if not found:
            raise FileNotFoundError(f"{path} holds no picture ({', '.join(_SUFFIXES)})")
        settings_file = path / SETTINGS
        settings = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
        if not (path / MANIFEST).is_file():
            rows = [Generated(name, file, None, None) for name, file in found.items()]
            return cls(path, rows, settings)
        rows = []
        for number, line in enumerate((path / MANIFEST).read_text("utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
                name = Path(str(entry.get("file", entry["id"]))).name
                prompt, seed = str(entry["prompt"]), entry.get("seed")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f'line {number} of {path / MANIFEST} is not {{"id": …, "prompt": …}}: {error!r}'
                ) from error
            file = found.get(name) or found.get(Path(name).stem)
            if file is None:
                raise FileNotFoundError(
                    f"{path / MANIFEST} names {name}, which is not there: finish the sampling first"
                )
            rows.append(Generated(str(entry["id"]), file, prompt, seed))
        return cls(path, rows, settings)

    @property
    def prompts(self) -> list[str] | None:
        """Every picture's prompt; None where they are not known."""
        texts = [row.prompt for row in self.rows]
        return None if None in texts else texts

    def missing(self, block: Iterable[int]) -> bool:
        """Whether a picture of the block is not there yet, or not whole."""
        return not all(_is_whole(self.rows[k].path) for k in block)

    def write(self, k: int, image: UInt8[Tensor, "3 height width"]) -> None:
        """Write picture k: beside its place first, then renamed into it."""
        path = self.rows[k].path
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
        to_pil(image).save(unfinished, format="PNG")
        unfinished.replace(path)

    def load(
        self, indices: Iterable[int], protocol: Protocol
    ) -> UInt8[Tensor, "count 3 size size"]:
        """Some pictures, cropped and resized as the protocol says where they are of another size.

        Raises:
            FileNotFoundError: one of them is not there.
            ValueError: one of them is damaged.
        """
        rows = (self.rows[k] for k in indices)
        return torch.stack([prepare(open_image(row.path), protocol) for row in rows])


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")


def _is_whole(file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        with Image.open(file) as picture:
            picture.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def write_beside(file: Path, content: bytes) -> None:
    """Write a file beside its place first, then rename it into it."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.part")
    unfinished.write_bytes(content)
    unfinished.replace(file)
