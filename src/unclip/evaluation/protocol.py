"""A protocol: everything besides the model that a number depends on, named and hashed."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from unclip.data.order import rng


class Item(NamedTuple):
    """A real image as a source lists it."""

    id: str
    captions: tuple[str, ...]  # at least one caption
    about: Mapping[str, Any] = MappingProxyType({})  # metadata, such as the objects in the scene


class Prompt(NamedTuple):
    """A caption to sample, and the image that it belongs to."""

    id: str  # names the file of the generated image
    text: str
    item: int  # index of the real image in its source


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Which captions are sampled, at which size, and what their images are compared with.

    Two numbers are comparable only if their protocols, their data and their counts are equal:
    `key` says so in a few letters. All field names and values are hashed, so they never change.
    """

    name: str  # name of the protocol, such as "coco14-30k"
    # layout of the data: "shards" (ROOT/SPLIT/SIZE/*.tar), "coco" (MS-COCO's folders), or "prompts"
    # (captions without real images, for samples outside the data)
    format: Literal["shards", "coco", "prompts"]
    split: str  # split of the captions, such as "val2014"
    # "one_per_image" draws `count` different images and one caption of each; "any" draws `count` of
    # all captions, so an image may occur twice; "first" takes the first caption of the first
    # `count` images, without drawing
    captions: Literal["one_per_image", "any", "first"]
    count: int  # number of prompts; all of them if there are fewer
    resolution: int  # width and height in pixels; upsamplers beyond it are not used
    # "centre" crops the central square of a real image, "none" squashes it
    crop: Literal["centre", "none"] = "centre"
    filter: Literal["lanczos", "bicubic"] = "lanczos"  # filter of the antialiased resizing
    reference: str  # split of the real images to compare with
    reference_count: int | None = None  # number of the split's first images; None is all of them
    network: str  # feature network of the main number
    repeats: int = 1  # number of images of each prompt, each with its own noise
    seed: int = 0  # seed of the draw

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(
                f"protocol.name is {self.name!r}; it names files: letters, digits, '_', '.' and '-'"
            )
        for name, kind in get_type_hints(type(self)).items():
            value, known = getattr(self, name), get_args(kind)
            if get_origin(kind) is Literal and value not in known:
                choices = ", ".join(known)
                raise ValueError(f"protocol.{name} is {value!r}; it must be one of {choices}")
        for name in ("count", "resolution", "reference_count", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"protocol.{name} is {value}; it must be at least 1")

    def describe(self) -> dict[str, Any]:
        """Return all fields and their hash."""
        return {**asdict(self), "hash": fingerprint(asdict(self))}

    def key(self, data: str, count: int) -> str:
        """Return the name that comparable numbers share: protocol, data fingerprint and count."""
        digest = fingerprint({**asdict(self), "data": data, "drawn": count})
        return f"{self.name}-{self.resolution}-n{count}-{digest}"

    def draw(self, items: Sequence[Item]) -> list[Prompt]:
        """Draw the prompts in the order of their numbers; a smaller count gives a prefix."""
        if not items:
            raise ValueError(f"the split {self.split} has no image with a caption")
        if self.captions == "any":
            chosen = [
                Prompt(f"{item.id}-{number}", text, k)
                for k, item in enumerate(items)
                for number, text in enumerate(item.captions)
            ]
        else:
            chosen = [Prompt(item.id, self._one(item), k) for k, item in enumerate(items)]
        if self.captions != "first":
            rng("protocol", self.seed, self.split).shuffle(chosen)
        chosen, numbers = chosen[: self.count], range(self.repeats)
        if self.repeats == 1:
            return chosen
        return [one._replace(id=f"{one.id}-{number}") for one in chosen for number in numbers]

    def _one(self, item: Item) -> str:
        """Return the first caption of an image, or draw one."""
        if self.captions == "first":
            return item.captions[0]
        choice = rng("protocol", self.seed, self.split, item.id)
        return item.captions[choice.randrange(len(item.captions))]


def fingerprint(values: Any) -> str:
    """Hash a plain value to eight hexadecimal digits."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
