"""Measure the decoder: Fréchet distances to real images, and the prior gap (section 5.1)."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import torch

from unclip.bundle import StageMetadata, build
from unclip.evaluation.choices import judge_choices
from unclip.evaluation.context import SEEN, VALIDATION, Context
from unclip.evaluation.features import (
    EfficientNetLite0,
    Features,
    Images,
    encode_images,
    encode_texts,
)
from unclip.evaluation.frechet import bootstrap_error, frechet, kernel_distance, seeded
from unclip.evaluation.measurement import Measurement, Numbers, Result, Table
from unclip.images import to_uint8
from unclip.stages import Stage

NETWORK = "effnet_lite0"
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
    cascade, size = context.cascade, context.settings.batch_size
    stage: Any = build_untrained(cascade.metadata["decoder"], seed=context.seed)
    stage.to(context.device)
    images = []
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


def build_untrained(metadata: StageMetadata, *, seed: int) -> Stage:
    """Build a stage from its recipe with the initial weights of `seed`."""
    with seeded(seed):
        return build(metadata.recipe).requires_grad_(False).eval()
