"""What is checked before a run starts, so that it does not fail hours later."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from unclip.bundle import read_metadata, stage_file
from unclip.data.shards import list_shards
from unclip.training.resuming import LAST, PREVIOUS

# The stage whose pictures a stage enlarges.
BELOW = {"upsampler_256": "decoder", "upsampler_1024": "upsampler_256"}


def check_disk(stage: nn.Module, folders: Sequence[str | Path], run_folder: str | Path) -> None:
    """Wants room for two training checkpoints and the exported stage, in each folder.

    A checkpoint is written next to the old one: weights, averages and at most two moments of the
    optimizer. Those in the run's folder will be replaced.

    Raises:
        ValueError: naming the folder, what it has and what is needed.
    """
    earlier = [Path(run_folder, name) for name in (LAST, PREVIOUS)]
    replaced = sum(path.stat().st_size for path in earlier if path.is_file())
    exported = 4 * sum(p.numel() for p in stage.parameters())
    needed = max(checkpoint_bytes(stage) * 2 - replaced, 0) + exported
    for folder in map(Path, folders):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        if free < needed:
            raise ValueError(
                f"{folder}: {free / 2**30:.1f} GiB are free, and two checkpoints and the stage "
                f"need {needed / 2**30:.1f}: make room, or choose other folders.runs and "
                "folders.models"
            )


def checkpoint_bytes(stage: nn.Module) -> int:
    """The most that a training checkpoint takes: float32 weights, averages and two moments."""
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    return 4 * sum(p.numel() for p in stage.parameters()) + 12 * trained


def check_shards(data: Any) -> None:
    """Wants shards where the data module says.

    Raises:
        FileNotFoundError: naming the folder without shards and how they are made.
    """
    for source in data.sources():
        list_shards(source)


def check_chain(name: str, recipe: Mapping[str, Any], image_size: int, bundle: str | Path) -> None:
    """Wants an upsampler to start from what the stage below it makes, if the bundle has that.

    Args:
        name: the stage's.
        recipe: what it is built from.
        image_size: of the pictures that it makes.
        bundle: the folder of the trained stages.

    Raises:
        ValueError: the sizes do not chain.
    """
    below = BELOW.get(name)
    if below is None:
        return
    starts_from = image_size // recipe["scale"]
    if starts_from * recipe["scale"] != image_size:
        raise ValueError(f"{name}: {image_size} pixels are not {recipe['scale']} times whole ones")
    path = stage_file(bundle, below)
    if below == "decoder" and path.is_file():
        made = read_metadata(path).recipe["image_size"]
        if made != starts_from:
            raise ValueError(
                f"{name} starts from {starts_from} pixels, and {path} makes {made}: set "
                f"data.image_size={made * recipe['scale']}, or train a decoder of that size"
            )
