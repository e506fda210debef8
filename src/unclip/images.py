"""Open, resize, crop, convert and save images, independent of any data set.

An image file becomes an upright RGB `PIL.Image`; tensors are uint8 or float in [-1, 1].
"""

import io
import re
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from unclip.files import atomic_write, read_bytes

# The first bytes of each format that is read. None of these decoders runs another program.
FORMATS = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",  # also MPO, a JPEG with several images
    "WEBP": rb"RIFF.{4}WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0{3}",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "AVIF": rb".{4}ftyp(.{4}){0,16}avi[fs]",
}
# Formats that are not read, and a command that converts a file.
OTHER_FORMATS = {
    "HEIC": (rb".{4}ftyp(hei|hev|mif1|msf1)", "heif-convert IN.heic OUT.png"),
    "SVG": (rb"(\xef\xbb\xbf)?\s*<(.*<)?svg\b", "rsvg-convert -h 1024 IN.svg -o OUT.png"),
    "JPEG XL": (rb"\xff\x0a|\0{3}\x0cJXL ", "djxl IN.jxl OUT.png"),
    "JPEG 2000": (rb"\0{3}\x0cjP  |\xff\x4f\xff\x51", "opj_decompress -i IN.jp2 -o OUT.png"),
}
MAX_PIXELS = 2**27  # 11,585 × 11,585
ORIENTATION = 0x0112  # the EXIF tag
TRANSPOSES = {  # EXIF orientation → the operation that makes an image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
WIDE_GRAY = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class ImageError(ValueError):
    """Raised for bytes that are not a usable image; `kind` is the reason in two or three words."""

    def __init__(self, kind: str, detail: str):
        super().__init__(kind, detail)  # both, so that the error can be pickled
        self.kind, self.detail = kind, detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def open_image(
    image: str | Path | Image.Image | Tensor, *, background: str = "white"
) -> Image.Image:
    """Open an image as upright RGB.

    Args:
        image: a path, a Pillow image of any mode, or a tensor `H W` or `C H W` with 1, 3 or 4
            channels, uint8 or float in [-1, 1], optionally in a batch of one.
        background: color that replaces transparency.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not an image, or the tensor has another shape or dtype.
    """
    if isinstance(image, Tensor):
        return to_rgb(_from_tensor(image), background)
    if isinstance(image, Image.Image):
        return _without_info(to_rgb(upright(image), background))
    try:
        return decode_image(read_bytes(Path(image)), background=background)
    except FileNotFoundError:
        raise
    except (OSError, ImageError) as error:
        raise ValueError(f"cannot read the image {image}: {error}") from error


def image_format(content: bytes) -> str | None:
    """Return the format that the first bytes of a file show; None if it is not an image."""
    others = {name: pattern for name, (pattern, _) in OTHER_FORMATS.items()}
    for name, pattern in (FORMATS | others).items():
        if re.match(pattern, content[:1024], re.DOTALL):
            return name
    return None


def decode_image(
    content: bytes, *, max_pixels: int = MAX_PIXELS, background: str = "white"
) -> Image.Image:
    """Decode the bytes of an image file, the first frame of an animation, to upright RGB.

    The content decides the format. Broken EXIF data and all other metadata are ignored. The size
    in the header is checked before any pixel is decoded.

    Raises:
        ImageError: "not an image", "other format", "image too large" or "corrupt image".
    """
    name = image_format(content)
    if name is None:
        raise ImageError("not an image", f"its bytes are not those of {', '.join(FORMATS)}")
    if name in OTHER_FORMATS:
        raise ImageError("other format", f"{name}: convert it with `{OTHER_FORMATS[name][1]}`")
    if name == "PNG":
        content = _without_metadata(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata and sizes
            with Image.open(io.BytesIO(content), formats=[name]) as opened:
                if opened.width * opened.height > max_pixels:
                    raise ImageError("image too large", f"{opened.width} × {opened.height} pixels")
                opened.load()
                image = to_rgb(upright(opened), background)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("image too large", str(error)) from None
    except Exception as error:  # Pillow's plugins raise almost anything on broken files
        raise ImageError("corrupt image", f"{type(error).__name__}: {error}") from None
    return _without_info(image)


def _without_info(image: Image.Image) -> Image.Image:
    image.info = {}  # it holds the ICC profile, which would be saved with the image
    return image


def _without_metadata(png: bytes) -> bytes:
    """Remove all chunks of a PNG that do not change pixels; Pillow rejects large or broken ones."""
    kept, position = [png[:8]], 8
    while position + 8 <= len(png):
        name, end = png[position + 4 : position + 8], position + 12
        end += int.from_bytes(png[position : position + 4], "big")
        if not name.isalpha():  # no chunk: the file is damaged here
            kept.append(png[position:])
            break
        chunk = png[position:end]
        intact_exif = name == b"eXIf" and zlib.crc32(chunk[4:-4]).to_bytes(4, "big") == chunk[-4:]
        if name[:1].isupper() or name == b"tRNS" or intact_exif:
            kept.append(chunk)
        position = len(png) if name == b"IEND" else end
    return b"".join(kept)


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
    """Rotate an image as its EXIF orientation says; broken EXIF data is ignored."""
    try:
        transpose = TRANSPOSES[image.getexif()[ORIENTATION]]
    except Exception:  # no orientation, or one of the many errors of broken data
        return image.copy()
    return image.transpose(transpose)


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Convert any mode to RGB: 16 bits and floats are scaled, transparency is `background`."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in (*WIDE_GRAY, "F"):  # Pillow would clip them
        gray = np.nan_to_num(np.asarray(image).astype(np.float64))
        white = 65535 if image.mode != "F" else 1 if gray.max() <= 1 else 255
        gray = (gray * (255 / white)).round().clip(0, 255)
        image = Image.fromarray(gray.astype(np.uint8))
    opaque = image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema()[0] == 255
    if image.has_transparency_data and not opaque:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, background), layer)
    return image.convert("RGB")


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

    Pixels that are not finite, or not floats, raise ValueError.
    """
    if not image.is_floating_point():
        raise ValueError(f"expected pixels in [-1, 1], not {image.dtype}")
    if not image.isfinite().all():
        raise ValueError("the image has pixels that are not finite: its stage's training diverged")
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(
    image: UInt8[Tensor, "*batch 3 height width"],
) -> Float[Tensor, "*batch 3 height width"]:
    """Convert uint8 pixels to floats in [-1, 1]; other dtypes raise ValueError."""
    if image.dtype != torch.uint8:
        raise ValueError(f"expected uint8 pixels, not {image.dtype}")
    return image.float() / 127.5 - 1


def bicubic(
    image: UInt8[Tensor, "batch 3 height width"], size: int
) -> UInt8[Tensor, "batch 3 size size"]:
    """Resize to size × size pixels bicubically, with antialiasing when the result is smaller.

    PyTorch's cubic kernel with antialiasing (a = -0.5, as Pillow's) differs from the one without
    (-0.75). The latter enlarges more sharply and comes closer to flat art: it is the harder
    baseline to beat, and the one that the upsamplers start from.
    """
    smaller = size < max(image.shape[-2:])
    resized = F.interpolate(to_float(image), (size, size), mode="bicubic", antialias=smaller)
    return to_uint8(resized)


def save_png(
    image: Image.Image, path: str | Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a PNG with metadata as its text, atomically, and return its path."""
    path, text = Path(path), PngInfo()
    for key, value in (metadata or {}).items():
        text.add_itxt(key, value)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)
    return path


def open_mask(
    mask: str | Path | Image.Image | Tensor, size: tuple[int, int]
) -> Bool[Tensor, "height width"]:
    """Open a mask for an image of `size`: true where it is white or a boolean tensor is true.

    Transparent parts are false, so a layer of white strokes is a mask. It is resized if needed.
    """
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = mask.to(torch.uint8) * 255
    gray = open_image(mask, background="black").convert("L")
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
