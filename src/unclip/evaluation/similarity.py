"""How close one image is to another: PSNR and SSIM, image by image."""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from unclip.evaluation.features import Images

_PSNR_CEILING = 100.0


def psnr(image: Images, target: Images) -> Float[Tensor, " batch"]:
    """Compute each image's peak signal-to-noise ratio in dB, at most 100 (finite means)."""
    ratios = peak_signal_noise_ratio(
        *_unit_range(image, target), data_range=1.0, dim=(1, 2, 3), reduction="none"
    )
    return ratios.clamp(max=_PSNR_CEILING)


def ssim(image: Images, target: Images) -> Float[Tensor, " batch"]:
    """Compute the structural similarity of each image (Wang et al. 2004; sigma 1.5)."""
    values, reference = _unit_range(image, target)
    pairs = zip(values.split(1), reference.split(1), strict=True)  # a 1024 px image takes 0.5 GB
    options: dict[str, Any] = {"data_range": 1.0, "reduction": "none"}
    ratios = [cast(Tensor, structural_similarity_index_measure(*pair, **options)) for pair in pairs]
    return torch.cat(ratios)


def _unit_range(image: Images, target: Images) -> tuple[Tensor, Tensor]:
    """Convert both to floats in [0, 1], the data range given to torchmetrics."""
    if image.shape != target.shape or image.dtype != torch.uint8 or target.dtype != torch.uint8:
        raise ValueError(
            f"expected two uint8 batches of one shape, not {image.dtype} {list(image.shape)} "
            f"and {target.dtype} {list(target.shape)}"
        )
    return image.float() / 255, target.float() / 255
