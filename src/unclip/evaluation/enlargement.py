"""The upsamplers by themselves: enlargements of true images compared with bicubic interpolation."""

import io
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from unclip.evaluation.emoji_probes import concept_set
from unclip.evaluation.features import EfficientNetLite0, extract
from unclip.evaluation.measures import Numbers, frechet_distances
from unclip.evaluation.similarity import psnr, ssim
from unclip.images import bicubic, to_tensor

CROP = 224  # the side that EfficientNet-Lite0 was trained with
FRESH = 1_000_000  # index of the first fresh scene; data sets take theirs from 0


def fresh_renders(
    root: str | Path, size: int, *, count: int, seed: int = 0
) -> UInt8[Tensor, "count 3 size size"]:
    """Render seen compositions that are in no split of any data set.

    Args:
        root: folder of emoji scenes, whose concept set is used.
        size: width and height in pixels.
        count: number of images.
        seed: seed of the scenes.

    Raises:
        ValueError: if `root` does not hold emoji scenes.
    """
    from unclip.emoji.render import scene_png
    from unclip.emoji.scenes import scenes

    if (name := concept_set(root)) is None:
        raise ValueError(f"{root} holds no emoji scenes to render: set benchmark.fresh=false")
    drawn = (scenes(name, seed=seed, split="test_seen", index=FRESH + k)[0] for k in range(count))
    opened = (Image.open(io.BytesIO(scene_png(scene, size))) for scene in drawn)
    return torch.stack([to_tensor(image.convert("RGB")) for image in opened])


def crops(
    images: UInt8[Tensor, "count 3 height width"], side: int = CROP
) -> UInt8[Tensor, "crops 3 side side"]:
    """Cut as many whole squares as fit, side by side and centered, out of each image."""
    rows, columns = (edge // side for edge in images.shape[-2:])
    top, left = (images.shape[-2] - rows * side) // 2, (images.shape[-1] - columns * side) // 2
    middle = images[:, :, top : top + rows * side, left : left + columns * side]
    squares = middle.unfold(2, side, side).unfold(3, side, side)  # (N, 3, rows, columns, s, s)
    return squares.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def compare_enlargements(
    enlarged: UInt8[Tensor, "count 3 height width"],
    true: UInt8[Tensor, "count 3 height width"],
    low_res: UInt8[Tensor, "count 3 low_height low_width"],
    *,
    device: torch.device | str = "cpu",
    resamples: int = 10,
    seed: int = 0,
) -> Numbers:
    """Compute PSNR, SSIM and the Fréchet distance to the true images, also of bicubic enlargement.

    PSNR and SSIM are means over images. The Fréchet distance ("fd_crops") is that of
    EfficientNet-Lite0 features of 224 px crops at full resolution: an image that is resized as a
    whole loses the detail that an upsampler adds. It needs at least two crops.
    """
    baseline = bicubic(low_res, true.shape[-1])
    ours, theirs = psnr(enlarged, true), psnr(baseline, true)
    numbers: Numbers = {
        "psnr": float(ours.mean()),
        "psnr_bicubic": float(theirs.mean()),
        "psnr_gain": float((ours - theirs).mean()),
        "psnr_gain_worst": float((ours - theirs).min()),
        "ssim": float(ssim(enlarged, true).mean()),
        "ssim_bicubic": float(ssim(baseline, true).mean()),
        "n": len(true),
    }
    network = EfficientNetLite0(size=CROP).to(device)
    features = [
        torch.cat([extract(network, crops(part)) for part in images.split(4)])
        for images in (enlarged, baseline, true)
    ]
    if len(features[-1]) > 1:
        named = dict(zip(("upsampler", "bicubic"), features, strict=False))
        distances = frechet_distances(named, features[-1], resamples=resamples, seed=seed)
        numbers["fd_crops"] = {**distances, "n": len(features[-1])}
    return numbers
