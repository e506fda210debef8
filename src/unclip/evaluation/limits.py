"""The limits that the paper admits (section 7): spelling, read by an OCR program, and detail."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchmetrics.functional.text import edit_distance

from unclip.contact_sheet import Tile, contact_sheet
from unclip.evaluation.context import SEEN, Context
from unclip.evaluation.features import Images
from unclip.evaluation.frechet import resample
from unclip.evaluation.measurement import INTERVAL, Measurement, Result, Score, mean_score
from unclip.evaluation.tables import score_table
from unclip.images import to_tensor

WORDS = ["HELLO", "STOP", "OPEN", "LOVE", "coffee", "welcome", "deep learning", "good morning"]
BANDS = {"low": (1 / 32, 1 / 8), "middle": (1 / 8, 1 / 4), "high": (1 / 4, 1 / 2)}
_PARTS = ("Det", "Cls", "Rec")  # text detection, orientation, recognition
_LUMINANCE = (0.299, 0.587, 0.114)
_DECIBELS = 10 / torch.log(torch.tensor(10.0)).item()
_FLOOR = 1e-9  # power of pixels in [0, 1], below what eight bits can represent

Read = Callable[[UInt8[Tensor, "3 height width"]], str]


class Spelling(Measurement):
    """1 - normalized edit distance between the requested words and those that OCR reads (fig. 16).

    Case and spaces are ignored, because OCR itself is unreliable there. The baseline is the same
    number for the words drawn by a font in black on white, at the same size. `right` is the share
    of images with every letter right.
    """

    words: Sequence[str] = field(default_factory=WORDS.copy)  # words to spell
    prompt: str = 'a sign that says "{}"'  # prompt with {} in place of the words
    each: int = 2  # number of images per prompt
    size: int = 256  # side of the images in pixels; the bundle's largest size if that is smaller

    title = "Spelling (section 7, figure 16)"
    stages = ("clip", "prior", "decoder")

    def __call__(self, context: Context) -> Result:
        read, size = load_reader(), min(self.size, context.cascade.size)
        wanted = [word for word in self.words for _ in range(self.each)]
        prompts = [self.prompt.format(word) for word in wanted]
        generated, folder = context.samples("spelling", prompts, size)
        signs = torch.stack([sign(word, size) for word in self.words])
        texts, sign_texts = ([read(image) for image in images] for images in (generated, signs))
        ours, ceiling = similarity(texts, wanted), similarity(sign_texts, self.words)
        pairs = {"similarity": (ours, ceiling), "right": (ours == 1, ceiling == 1)}
        scores = {
            name: mean_score(rows, seed=context.seed, real=real).plain()
            for name, (rows, real) in pairs.items()
        }
        shown = zip([*signs, *generated], [*self.words, *wanted], sign_texts + texts, strict=True)
        tiles = [Tile(image, f"“{word}”: read “{text}”") for image, word, text in shown]
        title = "Words drawn by a font, then generated."
        about = {"size": size, "read": texts, "samples": str(folder)}
        return Result(
            tables={"Spelling": score_table(scores)},
            images={"spelling": contact_sheet(tiles, columns=8, title=title)},
            values={"limits": {"spelling": {"scores": scores, "about": about}}},
            note="“real” is the same number for words drawn by a font: the reader's own accuracy.",
        )


def load_reader() -> Read:
    """Load RapidOCR with the networks in its package; nothing is downloaded."""
    fix = "pip install -e '.[text]'"
    if find_spec("rapidocr") is None or find_spec("onnxruntime") is None:
        raise FileNotFoundError(f"reading words needs rapidocr and onnxruntime: {fix}")
    rapidocr: Any = import_module("rapidocr")
    folder, files = Path(rapidocr.__file__).parent / "models", {}
    for part in _PARTS:
        found = sorted(folder.glob(f"*_{part.lower()}_*.onnx"))
        if not found:  # RapidOCR would download it
            raise FileNotFoundError(f"{folder} has no network for {part}: reinstall it with {fix}")
        files[f"{part}.model_path"] = str(found[0])
    threads = {"EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads()}
    engine = rapidocr.RapidOCR(params={"Global.log_level": "critical", **threads, **files})

    def read(image: UInt8[Tensor, "3 height width"]) -> str:
        pixels = image.permute(1, 2, 0).flip(2).contiguous().numpy()  # BGR, as OpenCV expects
        return " ".join(engine(pixels).txts or ())

    return read


def similarity(texts: Sequence[str], wanted: Sequence[str]) -> Float[Tensor, " count"]:
    """Return 1 - edit distance / length of the longer text, ignoring case and spaces."""
    first, second = (
        ["".join(text.split()).casefold() for text in side] for side in (texts, wanted)
    )
    pairs = zip(first, second, strict=True)
    longest = torch.tensor([max(len(one), len(other), 1) for one, other in pairs])
    return 1 - edit_distance(first, second, reduction="none").double() / longest


def sign(words: str, size: int) -> UInt8[Tensor, "3 size size"]:
    """Draw words in black on white, as large as fits."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    widest = draw.textlength(words, ImageFont.load_default(size / 3))
    font = ImageFont.load_default(size / 3 * min(0.85 * size / widest, 1))
    draw.text((size / 2, size / 2), words, "black", font, anchor="mm")
    return to_tensor(image)


class PowerSpectrum(Measurement):
    """Power of each band of spatial frequencies in decibels relative to real images.

    The baseline compares two random halves of the real images.
    """

    # number of images for each side in pixels; sizes above the bundle's are skipped
    images: Mapping[str, int] = field(default_factory=lambda: {"64": 96, "256": 32, "1024": 8})
    resamples: int = 500  # number of bootstrap resamples, of both sets of images

    title = "Detail: power spectrum relative to real images (section 7)"
    stages = ("clip", "prior", "decoder")

    def __call__(self, context: Context) -> Result:
        scores, folders = {}, {}
        for size, count in sorted((int(size), count) for size, count in self.images.items()):
            if context.cascade.size < size:
                continue
            real = context.real(SEEN, size, count=count)
            generated, folder = context.samples("detail", real.captions, size)
            folders[str(size)] = str(folder)
            spectra = radial_power(generated), radial_power(real.images)
            bands = compare(*spectra, resamples=self.resamples, seed=context.seed)
            scores |= {f"{size}_{band}": score.plain() for band, score in bands.items()}
        note = (
            "Decibels: 0 is as much power as real images have, -3 half as much (the images are too "
            "smooth), more than 0 is noise. Bands are in cycles per pixel; 0.5 is the finest."
        )
        about = {"unit": "dB", "bands": BANDS, "samples": folders}
        return Result(
            tables={"Detail": score_table(scores)},
            values={"limits": {"detail": {"scores": scores, "about": about}}},
            note=note,
        )


def radial_power(images: Images) -> Float[Tensor, "count radii"]:
    """Compute the power of each image's luminance at each radius of the frequency plane.

    It is the squared modulus of the Fourier transform, averaged over rings of width one; ring k is
    about k / size cycles per pixel. The mean is subtracted before a Hann window is applied, and the
    window's power is divided out, so that white noise has its variance at every radius.
    """
    size = images.shape[-1]
    window = torch.hann_window(size, periodic=True, dtype=torch.float64)
    window = window[:, None] * window
    frequency = torch.fft.fftfreq(size, dtype=torch.float64) * size
    radius = (frequency[:, None].square() + frequency.square()).sqrt().round().long()
    inside = radius <= size // 2
    ring = radius[inside]
    count = torch.bincount(ring)
    weights = torch.tensor(_LUMINANCE, dtype=torch.float64)
    rows = []
    for image in images:  # one by one: a 1024 px image takes 16 MB in complex numbers
        luminance = torch.einsum("c,chw->hw", weights, image.double() / 255)
        spectrum = torch.fft.fft2((luminance - luminance.mean()) * window)
        power = spectrum.abs().square()[inside] / window.square().sum()
        rows.append(torch.zeros(len(count), dtype=torch.float64).index_add_(0, ring, power) / count)
    return torch.stack(rows)


def band_power(
    power: Float[Tensor, "count radii"], band: tuple[float, float]
) -> Float[Tensor, " count"]:
    """Average the power of the rings in a band of frequencies in cycles per pixel."""
    radii = power.shape[1]
    frequency = torch.arange(radii) / (2 * (radii - 1))
    low, high = band
    return power[:, (frequency >= low) & (frequency <= high)].mean(dim=1)


def compare(
    generated: Float[Tensor, "n radii"],
    real: Float[Tensor, "m radii"],
    *,
    resamples: int,
    seed: int = 0,
) -> dict[str, Score]:
    """Return each band's power relative to real images, in decibels."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(real), generator=generator)
    half, scores = len(real) // 2, {}
    for name, band in BANDS.items():
        ours, theirs = band_power(generated, band), band_power(real, band)
        ratios = [
            ratio(resample(ours, generator), resample(theirs, generator)) for _ in range(resamples)
        ]
        resampled = torch.stack(ratios)
        low, high = resampled.quantile(INTERVAL).tolist()
        scores[name] = Score(
            float(ratio(ours, theirs)),
            float(resampled.std()),
            (low, high),
            len(ours),
            "nearest 0",
            len(theirs),
            float(ratio(theirs[order[:half]], theirs[order[half:]])) if half else None,
            half or None,
            about={"unit": "dB", "cycles_per_pixel": list(band)},
        )
    return scores


def ratio(power: Float[Tensor, " n"], reference: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """Return the ratio of two mean powers in decibels."""
    return _DECIBELS * ((power.mean() + _FLOOR).log() - (reference.mean() + _FLOOR).log())
