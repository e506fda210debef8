"""The pictures of an evaluation: contact sheets, full-size pictures, upsamplers beside bicubic."""

from collections.abc import Callable, Sequence
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from unclip.contact_sheet import Tile, contact_sheet
from unclip.evaluation.emoji_probes import sheet_prompts
from unclip.evaluation.real import Real
from unclip.evaluation.similarity import psnr
from unclip.images import bicubic, save_png, to_pil

Sampler = Callable[..., Tensor]  # (captions, *, size) -> pictures of bytes


def single_objects(
    sample: Sampler, name: str, out: Path, *, size: int, most: int = 18
) -> list[Path]:
    """A sheet of single-object prompts: own colors, seen and held-out recolourings."""
    kinds = sheet_prompts(name, most=most)
    chosen = [prompt for kind in kinds.values() for prompt in kind]
    images = sample([prompt.caption for prompt in chosen], size=size)
    tiles = [
        Tile(image, prompt.caption, marked=prompt.held_out)
        for image, prompt in zip(images, chosen, strict=True)
    ]
    title = "Single objects. Framed: pairs of object and color that training never saw."
    sheet = contact_sheet(tiles, columns=9, size=128, title=title)
    return [save_png(sheet, out / "single_objects.png")]


def held_out(
    sample: Sampler, captions: Sequence[str], out: Path, *, size: int, full: int = 4
) -> list[Path]:
    """A grid of pictures of held-out captions, the first `full` also in full size."""
    images = sample(list(captions), size=size)
    tiles = [Tile(image, caption) for image, caption in zip(images, captions, strict=True)]
    title = f"Held-out compositions, {size} px, from text alone."
    sheet = contact_sheet(tiles, columns=3, size=320, title=title)
    paths = [save_png(sheet, out / f"held_out_{size}.png")]
    for number, (image, caption) in enumerate(list(zip(images, captions, strict=True))[:full]):
        words = "-".join("".join(c if c.isalnum() else " " for c in caption.lower()).split())
        paths.append(
            save_png(to_pil(image), out / f"held_out_{size}" / f"{number}-{words[:80]}.png")
        )
    return paths


def enlargements(
    enlarged: UInt8[Tensor, "count 3 height width"],
    true: UInt8[Tensor, "count 3 height width"],
    low_res: UInt8[Tensor, "count 3 low_height low_width"],
    out: Path,
    *,
    stage: str,
    rows: int = 4,
    crop: int = 256,
) -> list[Path]:
    """For some renders, bicubic enlargement, the upsampler's work and the truth, side by side.

    What is larger than `crop` pixels is shown by its middle, lest the difference vanish.
    """
    baseline = bicubic(low_res[:rows], true.shape[-1])
    ours, theirs = psnr(enlarged[:rows], true[:rows]), psnr(baseline, true[:rows])
    first = (true.shape[-1] - crop) // 2 if true.shape[-1] > crop else 0
    middle = slice(first, first + crop)
    tiles = []
    for row in range(len(baseline)):
        tiles += [
            Tile(baseline[row, :, middle, middle], f"bicubic, {theirs[row]:.1f} dB"),
            Tile(enlarged[row, :, middle, middle], f"{stage}, {ours[row]:.1f} dB"),
            Tile(true[row, :, middle, middle], "true render"),
        ]
    title = f"{stage}: {low_res.shape[-1]} to {true.shape[-1]} px"
    sheet = contact_sheet(tiles, columns=3, size=crop, title=title, lines=1)
    return [save_png(sheet, out / f"{stage}.png")]


def varied(real: Real, count: int) -> list[int]:
    """The rows of `count` pictures, the kinds of scenes taking turns, no caption twice."""
    kinds: dict[str, list[int]] = {}
    seen: set[str] = set()
    for row, (caption, metadata) in enumerate(zip(real.captions, real.metadata, strict=True)):
        if caption not in seen:
            seen.add(caption)
            kinds.setdefault(str(metadata.get("kind")), []).append(row)
    longest = max(map(len, kinds.values()))
    rows = [kind[turn] for turn in range(longest) for kind in kinds.values() if turn < len(kind)]
    return rows[:count]
