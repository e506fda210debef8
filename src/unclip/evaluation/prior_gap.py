"""The prior gap: what a decoder makes of each thing that it can start from (section 5.1)."""

from collections.abc import Mapping

from jaxtyping import Float, UInt8
from torch import Tensor

from unclip.clip import ClipEmbedder
from unclip.evaluation import measures
from unclip.evaluation.features import EfficientNetLite0, extract
from unclip.evaluation.metrics import Kernel
from unclip.evaluation.real import Real
from unclip.evaluation.sampling import Sampling
from unclip.evaluation.scores import Evidence


def measure_gap(
    sampling: Sampling,
    real: Real,
    generated: UInt8[Tensor, "n 3 64 64"],
    features: Mapping[str, Float[Tensor, "m features"]],
    network: EfficientNetLite0,
    judge: ClipEmbedder | None,
    *,
    count: int,
    among: int,
    resamples: int,
) -> measures.Numbers:
    """Distances of the decoder's pictures from the true z_i, the prior's, z_t and the caption.

    The last is GLIDE's way: no image embedding at all. Distances depend on n, so that all are of
    equally many pictures of the same captions with the same noise.

    Args:
        sampling: the bundle.
        real: true pictures and their captions.
        generated: pictures from the prior's z_i, of the same captions.
        features: of "real", of "prior" (the generated) and of the "reference".
        network: whose features they are.
        judge: chooses a picture's caption; None leaves that out.
        count: pictures from each start.
        among: captions that the judge chooses from.
        resamples: of the bootstrap.
    """
    few, seed = min(count, len(real), len(generated)), sampling.settings.seed
    captions, embedder = real.captions[:few], sampling.cascade.embedder
    starts = {
        "true_embedding": measures.embed_images(embedder, real.images[:few]),
        "text_embedding": measures.embed_texts(embedder, captions),
        "caption_alone": sampling.null_embedding().expand(few, -1),
    }
    made = {name: sampling.decode(z, captions) for name, z in starts.items()}
    images = {"real": real.images[:few], "prior": generated[:few], **made}
    rows = {name: features[name][:few] for name in ("real", "prior")}
    rows |= {name: extract(network, pictures) for name, pictures in made.items()}
    gap = measures.frechet_distances(
        rows, features["reference"][:few], resamples=resamples, seed=seed
    )
    kernel = Kernel(network=network.name)
    for name, numbers in gap.items():
        evidence = Evidence(
            {network.name: rows[name]}, {network.name: features["reference"]}, seed=seed
        )
        (score,) = kernel(evidence).values()
        numbers["kid"] = score.value
        if judge is not None:
            shares = measures.judge_choices(
                judge, images[name], captions, {}, among=among, seed=seed
            )
            numbers["judge"] = shares["caption"]["share"]
    return {**gap, "n": few}
