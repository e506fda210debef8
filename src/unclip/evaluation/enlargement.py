"""Measure an upsampler alone: enlarge reduced real images and compare with bicubic enlargement."""

import torch
from PIL import Image

from unclip.contact_sheet import Tile, contact_sheet
from unclip.evaluation.context import SEEN, Context
from unclip.evaluation.decoder_distance import frechet_distances
from unclip.evaluation.features import EfficientNetLite0, Images, extract
from unclip.evaluation.measurement import Measurement, Numbers, Result, Table
from unclip.evaluation.similarity import psnr, ssim
from unclip.images import bicubic

CROP = 224  # side of the images that EfficientNet-Lite0 was trained with


class Enlargement(Measurement):
    """PSNR, SSIM and Fréchet distance of an upsampler's images, next to bicubic enlargement."""

    size: int  # side of the enlarged images, 256 or 1024 pixels
    count: int
    resamples: int = 10  # number of bootstrap resamples

    title = "An upsampler alone"

    @property
    def stages(self) -> tuple[str, ...]:
        """The upsampler."""
        return (f"upsampler_{self.size}",)

    def __call__(self, context: Context) -> Result:
        """Compare the enlarged images with the real ones."""
        (stage,) = self.stages
        (split,) = context.splits(SEEN)
        true = context.real(split, self.size, count=self.count).images
        low_res = bicubic(true, self.size // 4)
        enlarged = context.sampling.enlarge(low_res, self.size)
        options = {"resamples": self.resamples, "seed": context.seed}
        numbers = compare_enlargements(enlarged, true, low_res, device=context.device, **options)
        distances = numbers.get("fd_crops", {})
        rows = []
        for name, suffix in (("upsampler", ""), ("bicubic", "_bicubic")):
            distance = distances.get(name, {}).get("distance")
            row = [name, numbers[f"psnr{suffix}"], numbers[f"ssim{suffix}"], distance]
            rows.append([*row, numbers["n"], distances.get("n")])
        table = Table(["enlarged by", "PSNR, dB", "SSIM", "fd_crops", "n", "crops"], rows)
        sheet = comparison_sheet(enlarged, true, low_res, stage=stage)
        title = f"{self.size // 4} to {self.size} px"
        return Result(tables={title: table}, images={stage: sheet}, values={stage: numbers})


def compare_enlargements(
    enlarged: Images,
    true: Images,
    low_res: Images,
    *,
    device: torch.device | str = "cpu",
    resamples: int,
    seed: int = 0,
) -> Numbers:
    """Compute PSNR, SSIM and the Fréchet distance to the true images, also of bicubic enlargement.

    PSNR and SSIM are means over images. The Fréchet distance ("fd_crops") is that of
    EfficientNet-Lite0 features of 224 px crops at full resolution, because resizing whole images
    would remove the detail that an upsampler adds. It needs at least two crops.
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
    compared = {"upsampler": enlarged, "bicubic": baseline, "true": true}
    features = {
        name: torch.cat([extract(network, crops(part)) for part in images.split(4)])
        for name, images in compared.items()
    }
    reference = features.pop("true")
    if len(reference) > 1:
        distances = frechet_distances(features, reference, resamples=resamples, seed=seed)
        numbers["fd_crops"] = {**distances, "n": len(reference)}
    return numbers


def crops(images: Images, side: int = CROP) -> Images:
    """Cut the largest centered grid of whole squares out of each image."""
    rows, columns = (edge // side for edge in images.shape[-2:])
    top, left = (images.shape[-2] - rows * side) // 2, (images.shape[-1] - columns * side) // 2
    middle = images[:, :, top : top + rows * side, left : left + columns * side]
    squares = middle.unfold(2, side, side).unfold(3, side, side)  # (N, 3, rows, columns, s, s)
    return squares.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def comparison_sheet(
    enlarged: Images, true: Images, low_res: Images, *, stage: str, rows: int = 4, crop: int = 256
) -> Image.Image:
    """Show bicubic enlargement, the upsampler's image and the real one of the first few images.

    Images larger than `crop` pixels are cropped at their center, so that differences stay visible.
    """
    size = true.shape[-1]
    enlarged, true, baseline = enlarged[:rows], true[:rows], bicubic(low_res[:rows], size)
    ours, theirs = psnr(enlarged, true), psnr(baseline, true)
    first = max(size - crop, 0) // 2
    middle = (..., slice(first, first + crop), slice(first, first + crop))
    tiles = []
    for row in range(len(true)):
        tiles += [
            Tile(baseline[row][middle], f"bicubic, {theirs[row]:.1f} dB"),
            Tile(enlarged[row][middle], f"{stage}, {ours[row]:.1f} dB"),
            Tile(true[row][middle], "true render"),
        ]
    title = f"{stage}: {low_res.shape[-1]} to {size} px"
    return contact_sheet(tiles, columns=3, size=crop, title=title, lines=1)
