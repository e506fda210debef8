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


def psnr(image: Images, target: Images) -> Float[Tensor, " batch"]:
    """Compute each image's peak signal-to-noise ratio in dB, at most 100 (finite means)."""
    options: dict[str, Any] = {"data_range": 1.0, "dim": (1, 2, 3), "reduction": "none"}
    return peak_signal_noise_ratio(image / 255, target / 255, **options).clamp(max=100.0)


def ssim(image: Images, target: Images) -> Float[Tensor, " batch"]:
    """Compute the structural similarity of each image (Wang et al. 2004; sigma 1.5)."""
    options: dict[str, Any] = {"data_range": 1.0, "reduction": "none"}
    pairs = zip(image.split(1), target.split(1), strict=True)  # a 1024 px image takes 0.5 GB
    ratios = [
        structural_similarity_index_measure(one / 255, other / 255, **options)
        for one, other in pairs
    ]
    return torch.cat(cast(list[Tensor], ratios))
