"""Pictures as bytes, and how close one is to another: PSNR and SSIM, picture by picture."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from unclip.cascade import to_pixels

_PSNR_CEILING = 100.0


def to_uint8(
    image: Float[Tensor, "batch 3 height width"],
) -> UInt8[Tensor, "batch 3 height width"]:
    """Pixels in [-1, 1] as bytes: rounded, and clamped, so that 1.004 is white and does not wrap.

    Raises:
        ValueError: a pixel is not finite, or the pixels are bytes already.
    """
    if not image.is_floating_point():
        raise ValueError(f"pixels in [-1, 1] are wanted, not {image.dtype}")
    if not image.isfinite().all():
        raise ValueError("a picture has pixels that are not finite: its sampler or stage is broken")
    return to_pixels(image.float())


def to_float(
    image: UInt8[Tensor, "batch 3 height width"],
) -> Float[Tensor, "batch 3 height width"]:
    """Bytes as pixels in [-1, 1]."""
    if image.dtype != torch.uint8:
        raise ValueError(f"bytes are wanted, not {image.dtype}")
    return image.float() / 127.5 - 1


def bicubic(
    image: UInt8[Tensor, "batch 3 height width"], size: int | tuple[int, int]
) -> UInt8[Tensor, "batch 3 new_height new_width"]:
    """Pictures resized bicubically, antialiased where that makes them smaller.

    PyTorch's cubic is another one with antialiasing (a = -0.5, as Pillow's) than without (-0.75).
    The latter enlarges more sharply and comes nearer to flat art: it is the harder baseline to
    beat, and the one that the upsamplers themselves start from.
    """
    height, width = (size, size) if isinstance(size, int) else size
    smaller = height < image.shape[-2] or width < image.shape[-1]
    resized = F.interpolate(to_float(image), (height, width), mode="bicubic", antialias=smaller)
    return to_uint8(resized)


def psnr(
    image: UInt8[Tensor, "batch 3 height width"], target: UInt8[Tensor, "batch 3 height width"]
) -> Float[Tensor, " batch"]:
    """Peak signal-to-noise ratio of each picture in dB; 100 at most, so that means stay finite."""
    values, reference = _unit_range(image, target)
    ratios = peak_signal_noise_ratio(
        values, reference, data_range=1.0, dim=(1, 2, 3), reduction="none"
    )
    return ratios.clamp(max=_PSNR_CEILING)


def ssim(
    image: UInt8[Tensor, "batch 3 height width"], target: UInt8[Tensor, "batch 3 height width"]
) -> Float[Tensor, " batch"]:
    """Structural similarity of each picture (Wang et al. 2004: Gaussian window, sigma 1.5)."""
    values, reference = _unit_range(image, target)
    pairs = zip(values.split(1), reference.split(1), strict=True)  # a large picture takes 0.5 GB
    ratios = [structural_similarity_index_measure(*pair, data_range=1.0) for pair in pairs]
    return torch.stack(ratios)


def _unit_range(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float in [0, 1]: torchmetrics is given the range, never left to guess it."""
    if image.shape != target.shape or image.dtype != torch.uint8 or target.dtype != torch.uint8:
        raise ValueError(
            f"two sets of bytes of one shape are wanted, not {image.dtype} {list(image.shape)} "
            f"and {target.dtype} {list(target.shape)}"
        )
    return image.float() / 255, target.float() / 255
