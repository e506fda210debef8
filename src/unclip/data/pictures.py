"""Pictures of any kind as upright RGB ones, as squares and as tensors. It knows no data set."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

FILE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # none of them runs a program
ORIENTATION = 0x0112  # the EXIF tag
WIDE_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def open_picture(picture: str | Path | Image.Image | Tensor) -> Image.Image:
    """An upright RGB picture from a file, from Pillow or from a tensor.

    Args:
        picture: a path; a picture of any mode; or a tensor `H W` or `C H W` with 1, 3 or 4
            channels, uint8 or float in [-1, 1], that may lie in a batch of one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a picture, or a tensor of another shape or type.
    """
    if isinstance(picture, Tensor):
        return to_rgb(_from_tensor(picture))
    if isinstance(picture, Image.Image):
        return to_rgb(upright(picture))
    try:
        with Image.open(picture, formats=FILE_FORMATS) as opened:
            opened.load()
            return to_rgb(upright(opened))
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:
        raise ValueError(
            f"{picture} is not a picture: give a file of {', '.join(FILE_FORMATS)}"
        ) from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{picture} cannot be read as a picture: {error}") from error


def _from_tensor(picture: Tensor) -> Image.Image:
    pixels = picture.detach().cpu()
    if pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3, 4):
        raise ValueError(f"a picture is a tensor [3, height, width], not {list(picture.shape)}")
    if pixels.is_floating_point():
        if not pixels.isfinite().all() or pixels.abs().max() > 1 + 1e-3:
            raise ValueError("a picture's floats lie in [-1, 1]; these do not")
        pixels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise ValueError(f"a picture is uint8 or float, not {pixels.dtype}")
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF data says."""
    if picture.getexif().get(ORIENTATION, 1) != 1:
        return ImageOps.exif_transpose(picture)
    return picture


def to_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode in RGB: 16 bits scaled to 8, transparency laid on white."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode in WIDE_GREY:  # 16 bits in a PNG; PIL would clip them
        grey = np.asarray(picture).astype(np.float64) * (255 / 65535)
        picture = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data and not _is_opaque(picture):
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, layer)
    return picture.convert("RGB")


def _is_opaque(picture: Image.Image) -> bool:
    """Whether an alpha channel, if that is where transparency is said, says that there is none."""
    return picture.mode in ("RGBA", "LA") and picture.getchannel("A").getextrema()[0] == 255


def fit(picture: Image.Image, size: int) -> Image.Image:
    """The middle square of a picture, resized (bicubic, antialiased) to size × size."""
    if picture.size == (size, size):
        return picture
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def to_tensor(picture: Image.Image) -> UInt8[Tensor, "3 height width"]:
    """The pixels of an RGB picture."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()


def open_mask(
    mask: str | Path | Image.Image | Tensor, size: tuple[int, int]
) -> Bool[Tensor, "height width"]:
    """A mask for a picture of `size` (width, height): true where it is white, or true.

    Args:
        mask: as of `open_picture`, or a tensor of booleans; resized where its size is another.
        size: width and height of the picture.
    """
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = mask.to(torch.uint8) * 255
    grey = open_picture(mask).convert("L")
    if grey.size != size:
        grey = grey.resize(size, Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(grey) > 127)


def square_mask(mask: Bool[Tensor, "height width"], size: int) -> Bool[Tensor, "1 size size"]:
    """The middle square of a mask, as `fit` takes it of a picture: true where any of it is."""
    height, width = mask.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = mask[None, top : top + side, left : left + side]
    return torch.nn.functional.adaptive_max_pool2d(square.float(), size).bool()
