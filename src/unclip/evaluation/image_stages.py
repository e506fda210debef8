"""Measure the decoder, the prior gap (section 5.1) and the upsamplers on real images."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from PIL import Image

from unclip.bundle import build
from unclip.contact_sheet import Tile, contact_sheet
from unclip.evaluation.choices import judge_choices
from unclip.evaluation.context import SEEN, VALIDATION, Context
from unclip.evaluation.features import (
    EfficientNetLite0,
    Features,
    Images,
    encode_images,
    encode_texts,
    extract,
)
from unclip.evaluation.frechet import bootstrap_error, frechet, kernel_distance, seeded
from unclip.evaluation.measurement import Measurement, Numbers, Result, Table
from unclip.evaluation.similarity import psnr, ssim
from unclip.images import bicubic, to_uint8

NETWORK = "effnet_lite0"
CROP = 224  # side of the images that EfficientNet-Lite0 was trained with
_SOURCES = {
    "real": "(real images)",
    "true_embedding": "the true z_i",
    "prior": "the prior's z_i",
    "text_embedding": "z_t",
    "caption_alone": "the caption alone",
    "untrained": "(untrained decoder)",
}


class DecoderDistance(Measurement):
    """Fréchet distance of the decoder's images of seen compositions to the validation images.

    Generated, real and untrained images are compared at the same n.
    """

    untrained_steps: int = 2  # sampler steps of the untrained decoder; its output hardly varies
    resamples: int = 10  # number of bootstrap resamples

    title = "The decoder's Fréchet distance"
    stages = ("clip", "prior", "decoder")

    def __call__(self, context: Context) -> Result:
        captions = context.real(SEEN).captions
        images = untrained(context, captions, self.untrained_steps)
        features = {
            "real": context.split_features(NETWORK, "real", SEEN),
            "prior": context.split_features(NETWORK, "generated", SEEN),
            "untrained": context.features_of(NETWORK, "untrained", images),
        }
        reference = context.split_features(NETWORK, "real", VALIDATION)
        n, options = min(len(captions), len(reference)), {"seed": context.seed}
        few = {name: rows[:n] for name, rows in features.items()}
        distances = frechet_distances(few, reference[:n], resamples=self.resamples, **options)
        values = {
            f"fd_{NETWORK}": {**distances, "n": n},
            "reference": VALIDATION,
            "captions": SEEN,
            "feature_size": cast(EfficientNetLite0, context.network(NETWORK)).size,
        }
        return Result(tables={"Decoder": _table(distances, n)}, values={"decoder": values})


class PriorGap(Measurement):
    """Quality of the decoder's images from the true z_i, the prior's z_i, z_t and the caption.

    "The caption alone" is GLIDE: no image embedding. All sources have the same captions and noise,
    and the same number of images, because distances depend on it. The prior's is left out if the
    bundle has no prior.
    """

    count: int = 66  # number of images per source
    among: int = 16  # number of captions that the judge chooses from
    resamples: int = 10  # number of bootstrap resamples

    title = "The prior gap"
    stages = ("clip", "decoder")

    def __call__(self, context: Context) -> Result:
        real, few = context.real(SEEN), min(self.count, len(context.real(SEEN)))
        captions, seed = real.captions[:few], context.seed
        images = {"real": real.images[:few]}
        features = {"real": context.split_features(NETWORK, "real", SEEN)[:few]}
        with suppress(FileNotFoundError):  # the bundle has no prior
            images["prior"] = context.generated(SEEN)[:few]
            features["prior"] = context.split_features(NETWORK, "generated", SEEN)[:few]
        starts = {
            "true_embedding": encode_images(context.embedder, real.images[:few]),
            "text_embedding": encode_texts(context.embedder, captions),
            "caption_alone": None,
        }
        for name, z in starts.items():
            images[name] = context.sampling.decode(z, captions)
            features[name] = context.features_of(NETWORK, ("prior gap", name), images[name])
        reference = context.split_features(NETWORK, "real", VALIDATION)[: len(real)]
        gap = frechet_distances(features, reference[:few], resamples=self.resamples, seed=seed)
        for name, numbers in gap.items():
            numbers["kid"] = kernel_distance(features[name], reference, seed=seed)[0]
            if context.has_judge:
                options = {"among": self.among, "seed": seed}
                chosen = judge_choices(context.judge, images[name], captions, {}, **options)
                numbers["judge"] = chosen["caption"]["share"]
        table = _table(gap, few, {"kid": "kid", "judge": "judge chooses the caption"})
        values = {"decoder": {"prior_gap": {**gap, "n": few}}}
        return Result(tables={"Prior gap": table}, values=values)


def _table(found: Mapping[str, Numbers], n: int, more: Mapping[str, str] | None = None) -> Table:
    """Return a row per source of the embedding, with `more` columns."""
    named = {words: {**found[k], "n": n} for k, words in _SOURCES.items() if k in found}
    columns = {"distance": f"fd_{NETWORK}", "error": "±", **(more or {}), "n": "n"}
    return Table.of("decoder from", named, columns)


def frechet_distances(
    features: Mapping[str, Features], reference: Features, *, resamples: int = 10, seed: int = 0
) -> dict[str, Numbers]:
    """Return each set's Fréchet distance to a reference of the same size, with bootstrap error."""
    if sizes := {len(rows) for rows in features.values()} - {len(reference)}:
        raise ValueError(
            f"distances at n={len(reference)} and n={min(sizes)} are not comparable: use the same n"
        )
    return {
        name: {
            "distance": frechet(rows, reference),
            "error": bootstrap_error(rows, reference, resamples=resamples, seed=seed),
        }
        for name, rows in features.items()
    }


@torch.inference_mode()
def untrained(context: Context, captions: Sequence[str], steps: int) -> Images:
    """Sample images of the prior's embeddings from the decoder as it was before training."""
    size, images = context.settings.batch_size, []
    with seeded(context.seed):  # the initial weights
        stage: Any = build(context.cascade.metadata["decoder"].recipe)
    stage.eval().to(context.device)
    for start in range(0, len(captions), size):
        part = slice(start, start + size)
        text = context.embedder.text(captions[part])._asdict()
        z = context.predicted(SEEN)[part].to(context.device)
        seeds = range(context.seed + start, context.seed + start + len(z))
        sampled = stage.sample(
            stage.condition({**text, "image_embedding": z}),
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
            guidance_scale=1,
            steps=steps,
        )
        images.append(to_uint8(sampled.cpu()))
    return torch.cat(images)


class Enlargement(Measurement):
    """PSNR, SSIM and Fréchet distance of an upsampler's images, next to bicubic enlargement."""

    size: int  # side of the enlarged images, 256 or 1024 pixels
    count: int
    resamples: int = 10  # number of bootstrap resamples

    title = "An upsampler alone"

    @property
    def stages(self) -> tuple[str, ...]:
        """The upsampler."""
        return (f"upsampler_{self.size}",)

    def __call__(self, context: Context) -> Result:
        (stage,) = self.stages
        (split,) = context.splits(SEEN)
        true = context.real(split, self.size, count=self.count).images
        low_res = bicubic(true, self.size // 4)
        enlarged = context.sampling.enlarge(low_res, self.size)
        options = {"resamples": self.resamples, "seed": context.seed}
        numbers = compare_enlargements(enlarged, true, low_res, device=context.device, **options)
        distances = numbers.get("fd_crops", {})
        rows = []
        for name, suffix in (("upsampler", ""), ("bicubic", "_bicubic")):
            distance = distances.get(name, {}).get("distance")
            row = [name, numbers[f"psnr{suffix}"], numbers[f"ssim{suffix}"], distance]
            rows.append([*row, numbers["n"], distances.get("n")])
        table = Table(["enlarged by", "PSNR, dB", "SSIM", "fd_crops", "n", "crops"], rows)
        sheet = comparison_sheet(enlarged, true, low_res, stage=stage)
        title = f"{self.size // 4} to {self.size} px"
        return Result(tables={title: table}, images={stage: sheet}, values={stage: numbers})


def compare_enlargements(
    enlarged: Images,
    true: Images,
    low_res: Images,
    *,
    device: torch.device | str = "cpu",
    resamples: int,
    seed: int = 0,
) -> Numbers:
    """Compute PSNR, SSIM and the Fréchet distance to the true images, also of bicubic enlargement.

    PSNR and SSIM are means over images. The Fréchet distance ("fd_crops") is that of
    EfficientNet-Lite0 features of 224 px crops at full resolution, because resizing whole images
    would remove the detail that an upsampler adds. It needs at least two crops.
    """
    baseline = bicubic(low_res, true.shape[-1])
    ours, theirs = psnr(enlarged, true), psnr(baseline, true)
    numbers: Numbers = {
        "psnr": float(ours.mean()),
        "psnr_bicubic": float(theirs.mean()),
        "psnr_gain": float((ours - theirs).mean()),
        "psnr_gain_worst": float((ours - theirs).min()),
        "ssim": float(ssim(enlarged, true).mean()),
        "ssim_bicubic": float(ssim(baseline, true).mean()),
        "n": len(true),
    }
    network = EfficientNetLite0(size=CROP).to(device)
    compared = {"upsampler": enlarged, "bicubic": baseline, "true": true}
    features = {
        name: torch.cat([extract(network, crops(part)) for part in images.split(4)])
        for name, images in compared.items()
    }
    reference = features.pop("true")
    if len(reference) > 1:
        distances = frechet_distances(features, reference, resamples=resamples, seed=seed)
        numbers["fd_crops"] = {**distances, "n": len(reference)}
    return numbers


def crops(images: Images, side: int = CROP) -> Images:
    """Cut the largest centered grid of whole squares out of each image."""
    rows, columns = (edge // side for edge in images.shape[-2:])
    top, left = (images.shape[-2] - rows * side) // 2, (images.shape[-1] - columns * side) // 2
    middle = images[:, :, top : top + rows * side, left : left + columns * side]
    squares = middle.unfold(2, side, side).unfold(3, side, side)  # (N, 3, rows, columns, s, s)
    return squares.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def comparison_sheet(enlarged: Images, true: Images, low_res: Images, *, stage: str) -> Image.Image:
    """Show bicubic enlargement, the upsampler's image and the real one of the first four images.

    Images larger than 256 pixels are cropped at their center, so that differences stay visible.
    """
    size, first = true.shape[-1], max(true.shape[-1] - 256, 0) // 2
    middle = (..., slice(first, first + 256), slice(first, first + 256))
    shown = {"bicubic": bicubic(low_res[:4], size), stage: enlarged[:4]}
    ratios = {name: psnr(images, true[:4]) for name, images in shown.items()}
    tiles = []
    for row, image in enumerate(true[:4]):
        for name, images in shown.items():
            tiles.append(Tile(images[row][middle], f"{name}, {ratios[name][row]:.1f} dB"))
        tiles.append(Tile(image[middle], "true render"))
    title = f"{stage}: {low_res.shape[-1]} to {size} px"
    return contact_sheet(tiles, columns=3, size=256, title=title, lines=1)
