"""Crops of real pictures, and how near an upsampler comes to them."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from unclip.evaluation.features import EfficientNetLite0, extract
from unclip.evaluation.frechet import fit_gaussian, frechet_distance
from unclip.evaluation.real import read_real
from unclip.evaluation.similarity import ssim
from unclip.images import bicubic, to_float, to_uint8
from unclip.stages import UpsamplerStage

SIDES = {"upsampler_256": 64, "upsampler_1024": 128}


class Crops:
    """The same crops of a split's pictures for every upsampler of one size.

    Args:
        data: the data set's folder.
        split: whose pictures.
        stage: "upsampler_256" or "upsampler_1024".
        count: one crop of each of so many pictures, or of as many as there are.
        seeds: of places and noise, one a crop.
        device: where features are computed and the upsampler lives.
    """

    def __init__(
        self,
        data: Path,
        split: str,
        stage: str,
        *,
        count: int,
        seeds: Sequence[int],
        device: torch.device,
        scale: int = 4,
    ):
        size = int(stage.rpartition("_")[2])
        pictures = read_real(data, split, size, count=count).images
        self.seeds = list(seeds)[: len(pictures)]
        places = zip(pictures, self.seeds, strict=True)
        self.true = torch.cat([random_crop(image, SIDES[stage], seed) for image, seed in places])
        self.low_res = bicubic(self.true, SIDES[stage] // scale)
        self.device = device
        self.network = EfficientNetLite0().to(device)
        self.reference = fit_gaussian(extract(self.network, self.true))

    def __len__(self) -> int:
        return len(self.seeds)

    @torch.inference_mode()
    def enlarge(
        self, stage: UpsamplerStage, *, steps: int | None = None, batch_size: int = 16
    ) -> Tensor:
        """The crops enlarged again, uint8; `steps` None are the stage's own."""
        enlarged = []
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            low_res = to_float(self.low_res[part]).to(self.device)
            sampled = stage.sample(
                stage.condition({"low_res": low_res}),
                generators=[torch.Generator().manual_seed(seed) for seed in self.seeds[part]],
                steps=steps,
            )
            enlarged.append(to_uint8(sampled.cpu()))
        return torch.cat(enlarged)

    def bicubic(self) -> Tensor:
        """The baseline's enlargement."""
        return bicubic(self.low_res, self.true.shape[-1])

    def measure(self, images: Tensor) -> dict[str, float]:
        """Root mean square error of all pixels (in [-1, 1]), PSNR, SSIM and Fréchet distance.

        PSNR is that of the one error: a mean over crops would be of those that are plain color.
        """
        error = to_float(images) - to_float(self.true)
        rmse = float(error.square().mean().sqrt())
        features = fit_gaussian(extract(self.network, images))
        return {
            "rmse": rmse,
            "psnr": 20 * math.log10(2 / max(rmse, 1e-9)),
            "ssim": float(ssim(images, self.true).mean()),
            "frechet_distance": frechet_distance(features, self.reference),
        }


def random_crop(image: Tensor, side: int, seed: int) -> Tensor:
    """A square of `[3, H, W]` pixels that lies where the seed says, as a batch of one."""
    generator = torch.Generator().manual_seed(seed)
    top, left = (
        int(torch.randint(edge - side + 1, (1,), generator=generator)) for edge in image.shape[1:]
    )
    return image[None, :, top : top + side, left : left + side]
