"""The bundle that a command works with."""

import argparse
from pathlib import Path

from sample_commands.console import device, say

DTYPES = ("float32", "bfloat16", "float16")
LARGE = 2**30  # bytes of weights from which on they are worth a line


def add_memory(parser: argparse.ArgumentParser) -> None:
    """How large models are made to fit."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the networks")
    parser.add_argument(
        "--offload", action="store_true", help="keep one stage at a time on the device"
    )


def open_bundle(folder: Path, *, on: str | None, dtype: str = "float32", offload: bool = False):
    """The cascade; of a large one, the memory that its stages will take is said first.

    Raises:
        ValueError: the device cannot be used.
        FileNotFoundError: there is no bundle.
    """
    import torch

    from unclip.cascade import Cascade
    from unclip.memory import GIB, format_bytes, free_memory

    cascade = Cascade.load(folder, device=device(on), dtype=getattr(torch, dtype), offload=offload)
    needs = cascade.weight_bytes(*cascade.metadata)
    if sum(needs.values()) >= LARGE:
        free = free_memory(cascade.device)
        rest = "" if free is None else f"; {free / GIB:.1f} GiB are free on {cascade.device}"
        say(f"weights in {dtype}: {format_bytes(needs)}{rest}")
    return cascade


def size_of(cascade, wanted: int | None) -> int:
    """The size that is wanted; else the largest that the bundle can, said where that is not all."""
    from unclip.cascade import MAKES

    if wanted is not None:
        return wanted
    if cascade.size < max(MAKES):
        say(f"{cascade.folder} makes pictures of {cascade.size} pixels")
    return cascade.size
