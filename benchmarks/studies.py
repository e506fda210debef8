"""What a stage's samples are worth: one study a stage, each a function of the sampler.

A study draws the same samples, of the same seeds, with whatever sampler it is given and measures
them. `distances` names those of its measures that must come within a few per cent of DDPM's.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch.nn.functional as F
from crops import Crops
from torch import Tensor

from unclip.bundle import stage_file
from unclip.cascade import Cascade
from unclip.evaluation.features import EfficientNetLite0, extract
from unclip.evaluation.frechet import fit_gaussian, frechet_distance
from unclip.evaluation.measures import embed_images, judge_choices
from unclip.evaluation.networks import load_judge
from unclip.evaluation.real import read_real

Sampler = Callable[..., Tensor]
Measured = dict[str, float]
SPLIT, REFERENCE = "test_seen", "val"


class Study:
    """One stage's samples and measures.

    Args:
        cascade: the bundle's stages.
        data: the data set's folder.
        count: how many samples.
        batch_size: of sampling.
        seed: of the first sample; the others count on.
    """

    name = ""
    distances: tuple[str, ...] = ()
    shown = ""  # the measure that is drawn

    def __init__(self, cascade: Cascade, data: Path, count: int, *, batch_size: int, seed: int):
        self.cascade, self.data = cascade, data
        self.count, self.batch_size = count, batch_size
        self.seeds = range(seed, seed + count)
        self.stage = cascade.stage(self.name)

    def measure(self, sampler: Sampler, steps: int) -> Measured:
        """Draws all samples with `steps` evaluations each and measures them."""
        own = self.stage.sampler
        self.stage.sampler = sampler
        try:
            return self._measure(steps)
        finally:
            self.stage.sampler = own

    def _measure(self, steps: int) -> Measured:
        raise NotImplementedError


class PriorStudy(Study):
    """How near predicted image embeddings come to the true ones: one by one, and as a whole.

    1 - cosine alone rewards predicting the mean, as a sampler of few steps does, so the Fréchet
    distance between the two sets of embeddings stands beside it.
    """

    name, distances = "prior", ("cosine_distance", "frechet_distance")
    shown = "frechet_distance"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        real = read_real(self.data, SPLIT, 64, count=self.count)
        self.captions, self.seeds = real.captions, self.seeds[: len(real)]
        self.count = len(real)
        self.true = embed_images(self.cascade.embedder, real.images)

    def _measure(self, steps: int) -> Measured:
        predicted = self.cascade.prior(
            self.captions, seeds=self.seeds, steps={"prior": steps}, batch_size=self.batch_size
        )
        true, ours = fit_gaussian(self.true), fit_gaussian(predicted)
        return {
            "cosine_distance": 1 - float(F.cosine_similarity(predicted, self.true).mean()),
            "frechet_distance": frechet_distance(ours, true),
        }


class DecoderStudy(Study):
    """Fréchet distance to real pictures, and what the judge makes of them.

    The embeddings are the prior's, drawn once with its own sampler; without a prior, the true ones.
    """

    name, distances, shown = "decoder", ("frechet_distance",), "frechet_distance"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        real = read_real(self.data, SPLIT, 64, count=self.count)
        self.captions, self.seeds = real.captions, self.seeds[: len(real)]
        self.count = len(real)
        if stage_file(self.cascade.folder, "prior").is_file():
            self.embedding = self.cascade.prior(
                self.captions, seeds=self.seeds, batch_size=self.batch_size
            )
        else:
            self.embedding = embed_images(self.cascade.embedder, real.images)
        self.network = EfficientNetLite0().to(self.cascade.device)
        reference = read_real(self.data, REFERENCE, 64, count=self.count).images
        self.reference = fit_gaussian(extract(self.network, reference))

    @cached_property
    def judge(self):
        """The second CLIP, where the bundle has it."""
        folder = self.cascade.folder
        if not stage_file(folder, "judge").is_file():
            return None
        return load_judge(folder, self.cascade.embedder)

    def _measure(self, steps: int) -> Measured:
        images = self.cascade.decode(
            self.embedding,
            self.captions,
            seeds=self.seeds,
            size=64,
            steps={"decoder": steps},
            batch_size=self.batch_size,
        ).images[64]
        features = extract(self.network, images)
        measured = {"frechet_distance": frechet_distance(fit_gaussian(features), self.reference)}
        if self.judge is not None:
            choices = judge_choices(self.judge, images, self.captions, {})
            measured["judge_own_caption"] = choices["caption"]["share"]
        return measured


class UpsamplerStudy(Study):
    """Root mean square error and Fréchet distance to the truth, on crops of real pictures."""

    distances, shown = ("rmse", "frechet_distance"), "frechet_distance"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.crops = Crops(
            self.data,
            SPLIT,
            self.name,
            count=self.count,
            seeds=self.seeds,
            device=self.cascade.device,
        )
        self.count = len(self.crops)

    def _measure(self, steps: int) -> Measured:
        images = self.crops.enlarge(self.stage, steps=steps, batch_size=self.batch_size)
        return self.crops.measure(images)


class Upsampler256Study(UpsamplerStudy):
    """64 → 256."""

    name = "upsampler_256"


class Upsampler1024Study(UpsamplerStudy):
    """256 → 1024."""

    name = "upsampler_1024"


STUDIES: dict[str, type[Study]] = {
    study.name: study for study in (PriorStudy, DecoderStudy, Upsampler256Study, Upsampler1024Study)
}
