"""Detail (section 7): the power spectrum of generated pictures beside that of real ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from unclip.evaluation.folder import write_beside
from unclip.evaluation.limits import Bench, Limit, Measured
from unclip.evaluation.protocol import Prompt
from unclip.evaluation.real import read_real
from unclip.evaluation.scores import Score

SPLIT = "test_seen"
BANDS = {"low": (1 / 32, 1 / 8), "middle": (1 / 8, 1 / 4), "high": (1 / 4, 1 / 2)}
_LUMINANCE = (0.299, 0.587, 0.114)
_DECIBELS = 10 / torch.log(torch.tensor(10.0)).item()
_FLOOR = 1e-9  # of pixels in [0, 1]: below what eight bits can show


@dataclass(frozen=True, kw_only=True)
class Detail(Limit):
    """How much power each band of frequencies has, in decibels over real pictures' power.

    0 is as much; −3 is half as much: pictures are too smooth there; more than 0 is noise. Bands are
    given in cycles a pixel, half a cycle being the finest that there is.

    Args:
        pictures: how many of each side in pixels, if the bundle reaches it.
        resamples: of the bootstrap, over both sets of pictures.
    """

    pictures: Mapping[str, int] = field(default_factory=lambda: {"64": 96, "256": 32, "1024": 8})
    resamples: int = 500

    def __call__(self, bench: Bench) -> Measured:
        """Each band's ratio at each size; `real` is one half of the real pictures to the other."""
        scores, spectra, samples = {}, {}, {}
        for size, count in sorted((int(size), count) for size, count in self.pictures.items()):
            if bench.cascade.size < size:
                continue
            real = read_real(bench.data, SPLIT, size, count=count)
            prompts = [Prompt(f"{k:05d}", text, k) for k, text in enumerate(real.captions)]
            generated, folder = bench.sample("detail", prompts, size)
            samples[str(size)] = str(folder)
            spectra[size] = tuple(radial_power(images) for images in (generated, real.images))
            scores |= {
                f"{size}_{band}": score
                for band, score in compare(
                    *spectra[size], resamples=self.resamples, seed=bench.settings.seed
                ).items()
            }
        picture = bench.out / "pictures" / "detail.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_beside(picture, draw(spectra))
        return Measured(scores, [picture], {"unit": "dB", "bands": BANDS, "samples": samples})


def radial_power(
    images: UInt8[Tensor, "count 3 size size"],
) -> Float[Tensor, "count radii"]:
    """The power of each picture's luminance at each radius of the frequency plane.

    The squared modulus of the Fourier transform, averaged over rings one step wide; ring k is about
    k / size cycles a pixel. The mean is taken off before a Hann window, whose own power is divided
    out, so that white noise has its variance at every radius.
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
    for image in images:  # a large one takes 16 MB in complex numbers
        luminance = torch.einsum("c,chw->hw", weights, image.double() / 255)
        spectrum = torch.fft.fft2((luminance - luminance.mean()) * window)
        power = spectrum.abs().square()[inside] / window.square().sum()
        rows.append(torch.zeros(len(count), dtype=torch.float64).index_add_(0, ring, power) / count)
    return torch.stack(rows)


def band_power(
    power: Float[Tensor, "count radii"], band: tuple[float, float]
) -> Float[Tensor, " count"]:
    """The mean power of the rings whose frequency in cycles a pixel lies in a band."""
    radii = power.shape[1]
    frequency = torch.arange(radii) / (2 * (radii - 1))
    low, high = band
    return power[:, (frequency >= low) & (frequency <= high)].mean(dim=1)


def compare(
    generated: Float[Tensor, "n radii"],
    real: Float[Tensor, "m radii"],
    *,
    resamples: int = 500,
    seed: int = 0,
) -> dict[str, Score]:
    """Each band's power over that of real pictures, in decibels.

    Args:
        generated: `radial_power` of the pictures.
        real: of real ones.
        resamples: of the bootstrap.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(real), generator=generator)
    half = len(real) // 2
    scores = {}
    for name, band in BANDS.items():
        ours, theirs = band_power(generated, band), band_power(real, band)
        again = torch.stack(
            [
                ratio(_resampled(ours, generator), _resampled(theirs, generator))
                for _ in range(resamples)
            ]
        )
        interval = again.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        floor = float(ratio(theirs[order[:half]], theirs[order[half:]])) if half else None
        scores[name] = Score(
            float(ratio(ours, theirs)),
            float(again.std()),
            tuple(interval),
            len(ours),
            "nearest 0",
            len(theirs),
            floor,
            half or None,
            about={"unit": "dB", "cycles_per_pixel": list(band)},
        )
    return scores


def ratio(power: Float[Tensor, " n"], reference: Float[Tensor, " m"]) -> Float[Tensor, ""]:
    """The mean of some powers over that of others, in decibels."""
    return _DECIBELS * ((power.mean() + _FLOOR).log() - (reference.mean() + _FLOOR).log())


def draw(spectra: Mapping[int, tuple[Tensor, Tensor]]) -> bytes:
    """The spectra of each size, generated and real, and below them their ratio, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(4.4 * len(spectra), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        2, len(spectra), squeeze=False, sharex="col", height_ratios=(3, 2), sharey="row"
    )
    for (size, (generated, real)), (upper, lower) in zip(spectra.items(), axes.T, strict=True):
        frequency = torch.arange(1, generated.shape[1]) / size
        ours, theirs = (power.mean(dim=0)[1:] + _FLOOR for power in (generated, real))
        upper.loglog(frequency, theirs, color="black", label=f"real, n = {len(real)}")
        upper.loglog(frequency, ours, color="C3", label=f"generated, n = {len(generated)}")
        upper.set(title=f"{size} px", ylabel="power of luminance" if upper is axes[0, 0] else "")
        upper.legend()
        lower.semilogx(frequency, _DECIBELS * (ours / theirs).log(), color="C3")
        lower.axhline(0, color="black", linewidth=0.8)
        for low, high in BANDS.values():
            lower.axvspan(low, high, color="grey", alpha=0.06 + 0.2 * low)
        lower.set(xlabel="cycles a pixel", ylabel="over real, dB" if lower is axes[1, 0] else "")
        lower.xaxis.set_minor_formatter(NullFormatter())
        for axis in (upper, lower):
            axis.grid(alpha=0.3)
    png = BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _resampled(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randint(len(rows), (len(rows),), generator=generator)]
