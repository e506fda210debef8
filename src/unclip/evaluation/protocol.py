"""A protocol: everything beside the model that a number depends on, as one named, hashed value."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from unclip.data.order import rng


class Item(NamedTuple):
    """A real picture as a source lists it, or a prompt that has none.

    Attributes:
        id: its name.
        captions: at least one.
        about: what else the source says of it, such as the objects in the scene.
    """

    id: str
    captions: tuple[str, ...]
    about: Mapping[str, Any] = MappingProxyType({})


class Prompt(NamedTuple):
    """A caption to draw, and the picture that it belongs to."""

    id: str  # names the file of the generated picture
    text: str
    item: int  # the index of the real picture in its source


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Which captions are drawn, at which size, and what the pictures are measured against.

    Two numbers may stand in one table only where their protocols, their data and their counts are
    the same: `key` says so in a few letters.

    Args:
        name: such as "coco14-30k".
        format: how the data lie, "shards" (ROOT/SPLIT/SIZE/*.tar), "coco" (COCO's folders) or
            "prompts" (ROOT/SPLIT.jsonl, a line {"prompt": …} each, as GenEval's; no pictures).
        split: whose captions are drawn, such as "val2014".
        captions: "one_per_image" draws `count` different pictures and one caption of each, "any"
            draws `count` of all captions, so that a picture may come twice; "first" takes the
            first caption of the first `count` pictures, and draws nothing.
        count: of generated pictures; all that there are where there are fewer.
        resolution: in pixels, of both sides; what enlarges beyond it is outside.
        crop: "centre" cuts the middle square out of a real picture, "none" squashes it.
        filter: by which a picture is resized, antialiased.
        reference: the split that the pictures are measured against.
        reference_count: its first pictures; None is the whole split.
        network: the feature network of the headline number.
        repeats: pictures of each prompt, each with noise of its own.
        seed: of the draw.
    """

    name: str
    format: Literal["shards", "coco", "prompts"]
    split: str
    captions: Literal["one_per_image", "any", "first"]
    count: int
    resolution: int
    crop: Literal["centre", "none"] = "centre"
    filter: Literal["lanczos", "bicubic"] = "lanczos"
    reference: str
    reference_count: int | None = None
    network: str
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "format": ("shards", "coco", "prompts"),
            "captions": ("one_per_image", "any", "first"),
            "crop": ("centre", "none"),
            "filter": ("lanczos", "bicubic"),
        }
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(
                f"protocol.name is {self.name!r}; it names files: letters, digits, '_', '.' and '-'"
            )
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"protocol.{name} is {value!r}; it can be {', '.join(known)}")
        for name in ("count", "resolution", "reference_count", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"protocol.{name} is {value}; it is at least 1")

    def describe(self) -> dict[str, Any]:
        """All fields, and the hash over them."""
        return {**asdict(self), "hash": fingerprint(asdict(self))}

    def key(self, data: str, count: int) -> str:
        """The name of numbers that compare: by protocol, by the data's fingerprint, by count."""
        digest = fingerprint({**asdict(self), "data": data, "drawn": count})
        return f"{self.name}-{self.resolution}-n{count}-{digest}"

    def draw(self, items: Sequence[Item]) -> list[Prompt]:
        """The prompts, in the order in which they are numbered; a smaller count is a prefix.

        Raises:
            ValueError: there is nothing to draw from.
        """
        if not items:
            raise ValueError(f"the split {self.split} has no captioned picture")
        if self.captions == "first":
            chosen = [Prompt(item.id, item.captions[0], k) for k, item in enumerate(items)]
        elif self.captions == "any":
            chosen = [
                Prompt(f"{item.id}-{number}", text, k)
                for k, item in enumerate(items)
                for number, text in enumerate(item.captions)
            ]
        else:
            chosen = [Prompt(item.id, self._one(item), k) for k, item in enumerate(items)]
        if self.captions != "first":
            rng("protocol", self.seed, self.split).shuffle(chosen)
        chosen = chosen[: self.count]
        if self.repeats == 1:
            return chosen
        return [
            prompt._replace(id=f"{prompt.id}-{number}")
            for prompt in chosen
            for number in range(self.repeats)
        ]

    def _one(self, item: Item) -> str:
        chance = rng("protocol", self.seed, self.split, item.id)
        return item.captions[chance.randrange(len(item.captions))]


def fingerprint(values: Any) -> str:
    """Eight hexadecimal digits of a plain value."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
