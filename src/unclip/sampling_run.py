"""The seeds and options of one call of the cascade."""

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from unclip.bundle import STAGES

Progress = Callable[[str, int, int], None]


class StageOptions(TypedDict, total=False):
    """Options of the methods of `Cascade`.

    Attributes:
        guidance_scale: guidance scale, of the decoder if it takes part; None is the stage's own.
        steps: sampler steps by stage, such as `{"decoder": 16}`; the other stages take their own.
        batch_size: images that go through a stage together; it changes memory and time, not the
            images.
        progress: `progress(stage, step, steps)`, called after each sampler step; the steps of all
            batches are counted together.
    """

    guidance_scale: float | None
    steps: Mapping[str, int] | None
    batch_size: int
    progress: Progress | None


class Options(StageOptions, total=False):
    """Options of methods that return images: also their size, 64, 256 or 1024 (the default)."""

    size: int


class EditOptions(Options, total=False):
    """Options of edits: also the seed of the first image; images that differ by noise count up."""

    seed: int


@dataclass(frozen=True)
class Run:
    """One seed per image (None if nothing random is sampled), and the options of one call."""

    seeds: Sequence[int] | None
    size: int = 1024  # 0 in methods without the option, so that they refuse it
    guidance_scale: float | None = None
    steps: Mapping[str, int] | None = None
    batch_size: int = 8
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if unknown := (self.steps or {}).keys() - set(STAGES[1:]):
            raise ValueError(f"steps names {min(unknown)!r}; it can name {', '.join(STAGES[1:])}")
        if self.batch_size < 1 or (self.seeds is not None and not len(self.seeds)):
            raise ValueError("at least one seed and a batch_size of 1 or more are needed")

    def check_rows(self, inputs: Mapping[str, Sized]) -> None:
        """Check that each input has one row per seed."""
        count = None if self.seeds is None else len(self.seeds)
        for key, rows in inputs.items():
            if count not in (None, len(rows)):
                raise ValueError(f"{key} has {len(rows)} rows, but there are {count} seeds")

    def callback(
        self, stage: str, number: int, batches: int
    ) -> Callable[[int, int, Tensor], None] | None:
        """Return a sampler's callback for batch `number` of `batches`."""
        if (progress := self.progress) is None:
            return None
        return lambda step, steps, x0: progress(stage, number * steps + step, batches * steps)


def generator(seed: int, stage: str) -> torch.Generator:
    """Return the generator of an image in one stage; it is the same on every machine."""
    digest = hashlib.sha256(f"{operator.index(seed)} {stage}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
