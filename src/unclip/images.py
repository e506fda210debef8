"""Open, resize, crop, convert and save images, independent of any data set.

An image file becomes an upright RGB `PIL.Image`; tensors are uint8 or float in [-1, 1].
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from unclip.files import atomic_write

FILE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # decoders that run no other program
ORIENTATION = 0x0112  # the EXIF tag
WIDE_GRAY = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def open_image(image: str | Path | Image.Image | Tensor) -> Image.Image:
    """Open an image as upright RGB.

    Args:
        image: a path, a Pillow image of any mode, or a tensor `H W` or `C H W` with 1, 3 or 4
            channels, uint8 or float in [-1, 1], optionally in a batch of one.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not an image, or the tensor has another shape or dtype.
    """
    if isinstance(image, Tensor):
        return to_rgb(_from_tensor(image))
    if isinstance(image, Image.Image):
        return to_rgb(upright(image))
    try:
        with Image.open(image, formats=FILE_FORMATS) as opened:
            opened.load()
            return to_rgb(upright(opened))
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:
        raise ValueError(
            f"{image} is not an image file: use one of {', '.join(FILE_FORMATS)}"
        ) from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {image}: {error}") from error


def _from_tensor(image: Tensor) -> Image.Image:
    pixels = image.detach().cpu()
    if pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3, 4):
        raise ValueError(f"an image tensor is [3, height, width], not {list(image.shape)}")
    if pixels.is_floating_point():
        if not pixels.isfinite().all() or pixels.abs().max() > 1 + 1e-3:
            raise ValueError("the floats of an image must be in [-1, 1]")
        pixels = to_uint8(pixels)
    if pixels.dtype != torch.uint8:
        raise ValueError(f"an image tensor is uint8 or float, not {pixels.dtype}")
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def upright(image: Image.Image) -> Image.Image:
    """Rotate an image as its EXIF orientation says."""
    if image.getexif().get(ORIENTATION, 1) != 1:
        return ImageOps.exif_transpose(image)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: 16 bits scaled to 8, transparency pasted on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in WIDE_GRAY:  # 16 bits in a PNG; Pillow would clip them
        gray = np.asarray(image).astype(np.float64) * (255 / 65535)
        image = Image.fromarray(gray.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data and not _is_opaque(image):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    return image.convert("RGB")


def _is_opaque(image: Image.Image) -> bool:
    """Return whether the image has an alpha channel that is fully opaque."""
    return image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema()[0] == 255


def fit(image: Image.Image, size: int) -> Image.Image:
    """Crop the central square and resize it to size × size (bicubic, antialiased)."""
    if image.size == (size, size):
        return image
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def to_tensor(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    """Convert an RGB image to a uint8 tensor."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def to_pil(image: UInt8[Tensor, "3 height width"]) -> Image.Image:
    """Convert a uint8 tensor to a Pillow image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def to_uint8(
    image: Float[Tensor, "*batch 3 height width"],
) -> UInt8[Tensor, "*batch 3 height width"]:
    """Convert pixels in [-1, 1] to the nearest of 0..255; values out of range are clamped.

    Raises:
        ValueError: a pixel is not finite, or the pixels are not floats.
    """
    if not image.is_floating_point():
        raise ValueError(f"expected pixels in [-1, 1], not {image.dtype}")
    if not image.isfinite().all():
        raise ValueError("the image has pixels that are not finite: its stage's training diverged")
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(
    image: UInt8[Tensor, "*batch 3 height width"],
) -> Float[Tensor, "*batch 3 height width"]:
    """Convert uint8 pixels to floats in [-1, 1].

    Raises:
        ValueError: the pixels are not uint8.
    """
    if image.dtype != torch.uint8:
        raise ValueError(f"expected uint8 pixels, not {image.dtype}")
    return image.float() / 127.5 - 1


def bicubic(
    image: UInt8[Tensor, "batch 3 height width"], size: int | tuple[int, int]
) -> UInt8[Tensor, "batch 3 new_height new_width"]:
    """Resize bicubically, with antialiasing when the result is smaller.

    PyTorch's cubic kernel with antialiasing (a = -0.5, as Pillow's) differs from the one without
    (-0.75). The latter enlarges more sharply and comes closer to flat art: it is the harder
    baseline to beat, and the one that the upsamplers start from.
    """
    height, width = (size, size) if isinstance(size, int) else size
    smaller = height < image.shape[-2] or width < image.shape[-1]
    resized = F.interpolate(to_float(image), (height, width), mode="bicubic", antialias=smaller)
    return to_uint8(resized)


def save_png(
    image: Image.Image, path: str | Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a PNG atomically and return its path (lossy formats would change measurements).

    Args:
        image: the image.
        path: path of the file; its folder is created if needed.
        metadata: text stored in the file.
    """
    path, text = Path(path), PngInfo()
    for key, value in (metadata or {}).items():
        text.add_itxt(key, value)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)
    return path


def open_mask(
    mask: str | Path | Image.Image | Tensor, size: tuple[int, int]
) -> Bool[Tensor, "height width"]:
    """Open a mask for an image: true where it is white (or where a boolean tensor is true).

    Args:
        mask: as in `open_image`, or a boolean tensor; resized to the image's size if needed.
        size: width and height of the image in pixels.
    """
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = mask.to(torch.uint8) * 255
    gray = open_image(mask).convert("L")
    if gray.size != size:
        gray = gray.resize(size, Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(gray) > 127)


def square_mask(mask: Bool[Tensor, "height width"], size: int) -> Bool[Tensor, "1 size size"]:
    """Crop and resize a mask as `fit` does an image: true where any part of a pixel is true."""
    height, width = mask.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = mask[None, top : top + side, left : left + side]
    return F.adaptive_max_pool2d(square.float(), size).bool()
