"""How close one image is to another: PSNR and SSIM, image by image."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

_PSNR_CEILING = 100.0


def psnr(
    image: UInt8[Tensor, "batch 3 height width"], target: UInt8[Tensor, "batch 3 height width"]
) -> Float[Tensor, " batch"]:
    """Compute each image's peak signal-to-noise ratio in dB, at most 100 (finite means)."""
    values, reference = _unit_range(image, target)
    ratios = peak_signal_noise_ratio(
        values, reference, data_range=1.0, dim=(1, 2, 3), reduction="none"
    )
    return ratios.clamp(max=_PSNR_CEILING)


def ssim(
    image: UInt8[Tensor, "batch 3 height width"], target: UInt8[Tensor, "batch 3 height width"]
) -> Float[Tensor, " batch"]:
    """Compute the structural similarity of each image (Wang et al. 2004; sigma 1.5)."""
    values, reference = _unit_range(image, target)
    pairs = zip(values.split(1), reference.split(1), strict=True)  # a 1024 px image takes 0.5 GB
    ratios = [structural_similarity_index_measure(*pair, data_range=1.0) for pair in pairs]
    return torch.stack(ratios)


def _unit_range(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Convert both to floats in [0, 1], the data range that torchmetrics is told."""
    if image.shape != target.shape or image.dtype != torch.uint8 or target.dtype != torch.uint8:
        raise ValueError(
            f"expected two uint8 batches of one shape, not {image.dtype} {list(image.shape)} "
            f"and {target.dtype} {list(target.shape)}"
        )
    return image.float() / 255, target.float() / 255
