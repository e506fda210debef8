"""Detail (section 7): the power spectrum of generated images compared with that of real ones."""

from collections.abc import Mapping
from dataclasses import field
from io import BytesIO

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from unclip.evaluation.context import SEEN, Context
from unclip.evaluation.features import Images
from unclip.evaluation.frechet import resample
from unclip.evaluation.measurement import INTERVAL, Measurement, Result, Score
from unclip.evaluation.report.tables import score_table

BANDS = {"low": (1 / 32, 1 / 8), "middle": (1 / 8, 1 / 4), "high": (1 / 4, 1 / 2)}
_LUMINANCE = (0.299, 0.587, 0.114)
_DECIBELS = 10 / torch.log(torch.tensor(10.0)).item()
_FLOOR = 1e-9  # power of pixels in [0, 1], below what eight bits can represent


class PowerSpectrum(Measurement):
    """Power of each band of spatial frequencies in decibels relative to real images."""

    # number of images for each side in pixels; sizes above the bundle's are skipped
    images: Mapping[str, int] = field(default_factory=lambda: {"64": 96, "256": 32, "1024": 8})
    resamples: int = 500  # number of bootstrap resamples, of both sets of images

    title = "Detail: power spectrum relative to real images (section 7)"
    stages = ("clip", "prior", "decoder")

    def __call__(self, context: Context) -> Result:
        """Compare each band at each size; the baseline compares two halves of the real images."""
        scores, spectra, folders = {}, {}, {}
        for size, count in sorted((int(size), count) for size, count in self.images.items()):
            if context.cascade.size < size:
                continue
            real = context.real(SEEN, size, count=count)
            generated, folder = context.samples("detail", real.captions, size)
            folders[str(size)] = str(folder)
            spectra[size] = radial_power(generated), radial_power(real.images)
            bands = compare(*spectra[size], resamples=self.resamples, seed=context.seed)
            scores |= {f"{size}_{band}": score for band, score in bands.items()}
        note = (
            "Decibels: 0 is as much power as real images have, -3 half as much (the images are too "
            "smooth), more than 0 is noise. Bands are in cycles per pixel; 0.5 is the finest."
        )
        plain = {name: score.plain() for name, score in scores.items()}
        about = {"unit": "dB", "bands": BANDS, "samples": folders}
        return Result(
            tables={"Detail": score_table(plain)},
            images={"power_spectrum": plot(spectra)},
            values={"limits": {"detail": {"scores": plain, "about": about}}},
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
    """Return each band's power relative to real images, in decibels.

    The baseline compares two random halves of the real images.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(real), generator=generator)
    half = len(real) // 2
    scores = {}
    for name, band in BANDS.items():
        ours, theirs = band_power(generated, band), band_power(real, band)
        ratios = [
            ratio(resample(ours, generator), resample(theirs, generator)) for _ in range(resamples)
        ]
        resampled = torch.stack(ratios)
        low, high = resampled.quantile(INTERVAL).tolist()
        floor = float(ratio(theirs[order[:half]], theirs[order[half:]])) if half else None
        scores[name] = Score(
            float(ratio(ours, theirs)),
            float(resampled.std()),
            (low, high),
            len(ours),
            "nearest 0",
            len(theirs),
            floor,
            half or None,
            about={"unit": "dB", "cycles_per_pixel": list(band)},
        )
    return scores


def ratio(power: Float[Tensor, " n"], reference: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """Return the ratio of two mean powers in decibels."""
    return _DECIBELS * ((power.mean() + _FLOOR).log() - (reference.mean() + _FLOOR).log())


def plot(spectra: Mapping[int, tuple[Tensor, Tensor]]) -> Image.Image:
    """Plot the spectra of generated and real images of each size, and their ratio below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(spectra), 5.2), dpi=110, layout="constrained")
    shared = {"sharex": "col", "sharey": "row", "height_ratios": (3, 2)}
    axes = figure.subplots(2, len(spectra), squeeze=False, **shared)
    for (size, (generated, real)), (upper, lower) in zip(spectra.items(), axes.T, strict=True):
        frequency = torch.arange(1, generated.shape[1]) / size
        ours, theirs = (power.mean(dim=0)[1:] + _FLOOR for power in (generated, real))
        upper.loglog(frequency, theirs, color="black", label=f"real, n = {len(real)}")
        upper.loglog(frequency, ours, color="C3", label=f"generated, n = {len(generated)}")
        upper.set(title=f"{size} px")
        upper.legend()
        lower.semilogx(frequency, _DECIBELS * (ours / theirs).log(), color="C3")
        lower.axhline(0, color="black", linewidth=0.8)
        for low, high in BANDS.values():
            lower.axvspan(low, high, color="gray", alpha=0.06 + 0.2 * low)
        lower.set(xlabel="cycles per pixel")
        lower.xaxis.set_minor_formatter("")
    axes[0, 0].set(ylabel="power of luminance")
    axes[1, 0].set(ylabel="generated / real, dB")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    content = BytesIO()
    figure.savefig(content, format="png")
    return Image.open(content).convert("RGB")
