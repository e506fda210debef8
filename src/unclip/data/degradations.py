"""Make the low-resolution input of an upsampler from a true image, slightly degraded.

At sampling time an upsampler receives the output of the stage before it, which is never as clean
as a downsized photograph. Training on degraded inputs makes it robust to that. `gaussian_blur` is
for the first upsampler (64 → 256) and `bsr` for the second (256 → 1024). `downsize` only resizes.
All of them divide height and width, which must be multiples of 4, by 4.
"""

import io
import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from unclip.data.order import rng
from unclip.images import decode_image, to_pil, to_tensor

SCALE = 4  # of an upsampler
MIN_SIGMA = 0.05  # in pixels; a smaller sigma has no effect
# Ranges of bsr: σ in pixels of the small image, the intermediate size as a multiple of its size.
BLUR, RESIZE = (0.1, 0.6), (0.5, 1.5)


def downsize(
    image: UInt8[Tensor, "3 height width"], *, seed: str | int = 0
) -> UInt8[Tensor, "3 h w"]:
    """Downsize by area or by antialiased bicubic interpolation, each with probability 0.5.

    Both occur in practice: a render at the small size looks like the former, a resized photograph
    like the latter, which overshoots at edges.
    """
    if rng("downsize", seed).random() < 0.5:
        return _to_uint8(_average(image))
    size = _small_size(image)
    return _to_uint8(F.interpolate(image.float()[None], size, mode="bicubic", antialias=True)[0])


def gaussian_blur(
    image: UInt8[Tensor, "3 height width"], *, probability: float = 0.5, seed: str | int = 0
) -> UInt8[Tensor, "3 h w"]:
    """Downsize by area, then blur half of the time (unCLIP paper, section 2.1: kernel 3, σ 0.6).

    As in cascaded diffusion models (Ho et al. 2021, §4.2), the small image is blurred, and only
    with a probability: an upsampler that never sees a sharp input learns to undo the blur and adds
    halos to sharp ones. Area averaging keeps the mean exactly and looks like a render at the small
    size.
    """
    low_res = _average(image)
    if rng("gaussian_blur", seed).random() < probability:
        low_res = _convolve(low_res, gaussian_kernel(3, 0.6))
    return _to_uint8(low_res)


def bsr(
    image: UInt8[Tensor, "3 height width"],
    *,
    noise: tuple[float, float] = (0.0, 4.0),
    jpeg_quality: tuple[int, int] = (70, 95),
    seed: str | int = 0,
) -> UInt8[Tensor, "3 h w"]:
    """Blur, resize, add noise and compress in random order (Zhang et al. 2021, BSRGAN, §3.4).

    There are two blurs, an isotropic and an anisotropic one. The resizing passes through a random
    intermediate size. A final JPEG compression follows, as in BSRGAN. Each strength is drawn from a
    mild range: the image must keep its colors, so the noise is weak and JPEG keeps the full
    resolution of the color channels (4:4:4).

    Args:
        image: the true image.
        noise: range of σ of the Gaussian noise in levels of 255; the noise is gray or colored.
        jpeg_quality: range of the JPEG quality from 1 to 100; (100, 100) disables JPEG.
        seed: seed of all random choices; the result is a function of the image and the seed.
    """
    generator = rng("bsr", seed)
    size = _small_size(image)

    def isotropic(x: Tensor) -> Tensor:
        sigma = generator.uniform(*BLUR) * x.shape[-1] / size[-1]
        return _blur(x, sigma, sigma, 0.0)

    def anisotropic(x: Tensor) -> Tensor:
        along, across = (generator.uniform(*BLUR) * x.shape[-1] / size[-1] for _ in range(2))
        return _blur(x, along, across, generator.uniform(0, math.pi))

    def resize_twice(x: Tensor) -> Tensor:
        factor = generator.uniform(*RESIZE)
        mode = generator.choice(("bilinear", "bicubic"))
        through = [max(1, round(side * factor)) for side in size]
        x = F.interpolate(x[None], through, mode=mode, antialias=True)
        return F.interpolate(x, size, mode=mode, antialias=True)[0].clamp(0, 255)

    def add_noise(x: Tensor) -> Tensor:
        sigma = generator.uniform(*noise)
        channels = generator.choice((1, 3))
        normal = np.random.default_rng(generator.getrandbits(64)).standard_normal
        values = normal((channels, *x.shape[1:]), dtype=np.float32)
        return (x + sigma * torch.from_numpy(values)).clamp(0, 255)

    def jpeg(x: Tensor) -> Tensor:
        quality, buffer = generator.randint(*jpeg_quality), io.BytesIO()
        if quality == 100:
            return x
        to_pil(_to_uint8(x)).save(buffer, "JPEG", quality=quality, subsampling=0)
        return to_tensor(decode_image(buffer.getvalue())).float()

    steps = [isotropic, anisotropic, resize_twice, add_noise, jpeg]
    generator.shuffle(steps)
    x = image.float()
    for step in [*steps, jpeg]:
        x = step(x)
    return _to_uint8(x)


DEGRADATIONS = {"gaussian_blur": gaussian_blur, "bsr": bsr}


@lru_cache
def gaussian_kernel(size: int, sigma: float) -> Float[Tensor, "size size"]:
    """Return exp(-(x² + y²) / 2σ²) on a size × size grid around 0 (odd size), with the sum 1."""
    line = _gaussian(torch.arange(size, dtype=torch.float64) - size // 2, sigma)
    return torch.outer(line, line).float()


def _gaussian(x: Tensor, sigma: float) -> Tensor:
    line = torch.exp(-0.5 * (x / sigma) ** 2)
    return line / line.sum()


def _blur(x: Tensor, along: float, across: float, angle: float) -> Tensor:
    """Blur with an elliptic Gaussian: σ `along` the direction `angle` and `across` it."""
    widest = max(along, across)
    if widest < MIN_SIGMA:
        return x
    reach = min(max(1, round(3 * widest)), min(x.shape[-2:]) - 1)
    along, across = max(along, MIN_SIGMA), max(across, MIN_SIGMA)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    if along == across:  # separable
        line = _gaussian(offsets, along)
        return _convolve(_convolve(x, line[:, None]), line[None, :])
    v, u = torch.meshgrid(offsets, offsets, indexing="ij")
    p = math.cos(angle) * u + math.sin(angle) * v
    q = math.cos(angle) * v - math.sin(angle) * u
    weights = torch.exp(-0.5 * ((p / along) ** 2 + (q / across) ** 2))
    return _convolve(x, weights / weights.sum())


def _convolve(x: Float[Tensor, "3 h w"], weights: Float[Tensor, "k l"]) -> Float[Tensor, "3 h w"]:
    """Correlate each channel with the same weights, with reflect padding."""
    up, left = (side // 2 for side in weights.shape)
    mode = "reflect" if x.shape[-2] > up and x.shape[-1] > left else "replicate"
    padded = F.pad(x[None], [left, left, up, up], mode=mode)
    return F.conv2d(padded, weights.expand(3, 1, *weights.shape), groups=3)[0]


def _average(image: UInt8[Tensor, "3 height width"]) -> Float[Tensor, "3 h w"]:
    _small_size(image)
    return F.avg_pool2d(image.float()[None], SCALE)[0]


def _small_size(image: Tensor) -> list[int]:
    height, width = image.shape[-2:]
    if height % SCALE or width % SCALE:
        raise ValueError(f"an image of {width} × {height} pixels cannot be downsized {SCALE}×")
    return [height // SCALE, width // SCALE]


def _to_uint8(x: Float[Tensor, "3 h w"]) -> UInt8[Tensor, "3 h w"]:
    return x.round().clamp(0, 255).to(torch.uint8)
