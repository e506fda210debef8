"""Real pictures and their captions where they lie: in shards, or in folders as COCO has them.

A source lists its pictures without decoding them, and decodes those that are asked for.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from unclip.data.bad_samples import BadSample
from unclip.data.reader import decode_captions, decode_image, decode_metadata, find_image
from unclip.data.shards import RawSample, open_shards, read_positions
from unclip.evaluation.protocol import Item, Protocol
from unclip.images import to_tensor

DATA_COCO = "make data-coco"
_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}


class Source(ABC):
    """The pictures of one split.

    Attributes:
        has_pictures: False where there are prompts alone.
        items: every picture, in an order of its own.
        fingerprint: of ids, captions and sizes in bytes, whatever folder they lie in; of prompts
            alone, of all that their lines say.
        stamp: the same with the files' times: what is cached by it notices a change.
    """

    has_pictures = True
    items: list[Item]
    fingerprint: str
    stamp: str

    @abstractmethod
    def pictures(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The pictures of some items, as RGB; indices come in ascending order.

        Raises:
            ValueError: a picture is damaged. Nothing is skipped: measured on other pictures, a
                number would mean something else.
        """


def open_source(root: str | Path, split: str, protocol: Protocol) -> Source:
    """A split of the data that a protocol is about.

    Raises:
        FileNotFoundError: it is not there; the message has the command that brings it.
        ValueError: its annotations are damaged.
    """
    if protocol.format == "coco":
        return CocoSource(Path(root), split)
    if protocol.format == "prompts":
        return PromptSource(Path(root) / f"{split}.jsonl")
    return ShardSource(Path(root) / split / str(protocol.resolution))


def prepare(picture: Image.Image, protocol: Protocol) -> UInt8[Tensor, "3 size size"]:
    """A picture as the protocol crops and resizes it; one of its size already is left alone."""
    size = protocol.resolution
    if picture.size != (size, size):
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side) if protocol.crop == "centre" else None
        picture = picture.resize((size, size), _FILTERS[protocol.filter], box=box)
    return to_tensor(picture)


class CocoSource(Source):
    """ROOT/annotations/captions_SPLIT.json and the pictures of ROOT/SPLIT.

    Pictures are in the order of their ids; one without a caption is no item.
    """

    def __init__(self, root: Path, split: str) -> None:
        file, folder = root / "annotations" / f"captions_{split}.json", root / split
        for path in (file, folder):
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing: fetch MS-COCO with `{DATA_COCO}`, or set COCO_ROOT to a "
                    "folder that has annotations/ and the pictures"
                )
        names, captions = _read_captions(file)
        self._paths = {
            image: folder / name for image, name in sorted(names.items()) if image in captions
        }
        self.items = [Item(f"{image:012d}", tuple(captions[image])) for image in self._paths]
        stats = []
        for path in self._paths.values():
            try:
                stats.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{path} is named in {file.name} and missing: run `{DATA_COCO}` again"
                ) from error
        self.fingerprint = _digest(self.items, [stat[:2] for stat in stats])
        self.stamp = _digest(self.items, stats)

    def pictures(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The pictures of some items."""
        paths = list(self._paths.values())
        for index in indices:
            yield open_image(paths[index])


class ShardSource(Source):
    """A folder ROOT/SPLIT/SIZE of shards, in their order.

    Raises:
        FileNotFoundError: there are no such shards.
    """

    def __init__(self, folder: Path) -> None:
        self._shards = open_shards(folder)
        files = [shard.path for shard in self._shards]
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        rows = self._read(range(sum(shard.samples for shard in self._shards)), False)
        self.items = []
        for raw in rows:
            about = decode_metadata(raw.members)
            self.items.append(Item(raw.key, tuple(decode_captions(raw.members, about)), about))
        captions = [item[:2] for item in self.items]
        self.fingerprint = _digest(folder.name, captions, [stat[:2] for stat in stats])
        self.stamp = _digest(folder.name, captions, stats)

    def pictures(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The pictures of some items."""
        for raw in self._read(indices, True):
            extension, content = find_image(raw.members)
            yield decode_image(content, extension)

    def _read(self, indices: Sequence[int], pictures: bool) -> Iterator[RawSample]:
        if not len(indices):
            return
        wanted, line = set(indices), range(indices[0], indices[-1] + 1)
        try:
            for _, raw in read_positions(
                self._shards, line, wanted=wanted.__contains__, images=pictures
            ):
                if raw.bad is not None:
                    raise raw.bad
                yield raw
        except BadSample as bad:
            folder = self._shards[0].path.parent
            raise ValueError(
                f"a sample of {folder} is damaged ({bad.kind}): write it again with src/prepare.py"
            ) from bad


class PromptSource(Source):
    """Prompts without pictures: a file with a JSON object a line, each with its "prompt".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is something else.
    """

    has_pictures = False

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: put a JSON line with a prompt each there")
        self.items = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
            try:
                about = json.loads(line)
                self.items.append(Item(f"{number:05d}", (str(about["prompt"]),), about))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'line {number + 1} of {file} is not {{"prompt": …}}: {error!r}'
                ) from error
        asked = [(item.captions, sorted(item.about.items())) for item in self.items]
        self.fingerprint = self.stamp = _digest(asked)

    def pictures(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """There are none."""
        raise ValueError("prompts alone have no pictures")


def open_image(path: Path) -> Image.Image:
    """A picture file as RGB, decoded by content, whatever its name.

    Raises:
        ValueError: it is damaged, or not a picture that unclip reads.
    """
    extension = path.suffix.lower().lstrip(".")
    try:
        return decode_image(path.read_bytes(), extension, minimum_size=1)
    except (BadSample, KeyError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def stack(
    source: Source, indices: Sequence[int], protocol: Protocol
) -> UInt8[Tensor, "count 3 size size"]:
    """Some real pictures as the protocol wants them."""
    return torch.stack([prepare(picture, protocol) for picture in source.pictures(indices)])


def _read_captions(file: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    """File names and captions by image id, the captions in the order of their own ids."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        captions: dict[int, list[str]] = {}
        for row in sorted(content["annotations"], key=lambda row: row["id"]):
            if text := " ".join(str(row["caption"]).split()):
                captions.setdefault(int(row["image_id"]), []).append(text)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is not COCO's captions file ({error!r}): run `{DATA_COCO}` again"
        ) from error
    for name in names.values():
        if Path(name).name != name:
            raise ValueError(f"{file} names a picture outside its folder: {name!r}")
    return names, captions


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
