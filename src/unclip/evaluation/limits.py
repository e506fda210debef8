"""The limits that the paper admits (section 7): binding, spelling and detail, as numbers.

Each makes the pictures that it asks about, and stands beside real ones measured in the same way.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from unclip.cascade import Cascade
from unclip.evaluation.generation import generate
from unclip.evaluation.protocol import Prompt, Protocol
from unclip.evaluation.sampling import Settings
from unclip.evaluation.scores import Score


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a limit is measured with.

    Args:
        cascade: the bundle.
        data: the folder of the data.
        out: takes samples/, and pictures/ for people to look at.
        settings: of the samples.
    """

    cascade: Cascade
    data: Path
    out: Path
    settings: Settings

    def sample(
        self, name: str, prompts: Sequence[Prompt], size: int
    ) -> tuple[UInt8[Tensor, "count 3 size size"], Path]:
        """A picture of each prompt, kept in a folder of its own, and that folder.

        A second call with the same prompts finds them there.
        """
        protocol = Protocol(
            name=name,
            format="prompts",
            split=name,
            captions="first",
            count=len(prompts),
            resolution=size,
            reference=name,
            network="none",
        )
        folder = generate(
            self.cascade,
            prompts,
            protocol,
            self.settings,
            self.out / "samples",
            data=" ".join(f"{prompt.id}:{prompt.text}" for prompt in prompts),
        )
        return folder.load(range(len(prompts)), protocol), folder.path


@dataclass(frozen=True)
class Measured:
    """What a limit found.

    Args:
        scores: by name; `real` of each is what real pictures reach.
        paths: of pictures that show it.
        about: plain values that belong to all of its scores; "summary" is printed.
    """

    scores: dict[str, Score]
    paths: list[Path] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "scores": {name: score.plain() for name, score in self.scores.items()},
            "paths": [str(path) for path in self.paths],
            "about": self.about,
        }


class Limit(ABC):
    """One of the limits; a new one is a subclass and an entry in conf/limits."""

    @abstractmethod
    def __call__(self, bench: Bench) -> Measured:
        """Its numbers.

        Raises:
            FileNotFoundError: a stage, a package or data that it needs are missing.
            ValueError: it does not fit the data, or a file is damaged.
        """


def measure(limits: Mapping[str, Limit | None], bench: Bench) -> dict[str, dict[str, Any]]:
    """What each limit found, by its name; of one that lacks something, why."""
    found: dict[str, dict[str, Any]] = {}
    for name, limit in limits.items():
        if limit is None:
            continue
        try:
            found[name] = limit(bench).plain()
        except (FileNotFoundError, ValueError) as error:
            found[name] = {"scores": {}, "paths": [], "about": {}, "not_available": str(error)}
        if bench.settings.progress:
            tqdm.write(f"measured: {name}")
    return found
