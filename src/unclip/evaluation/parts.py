"""The parts of the offline benchmark, one method each, and what they share while they run."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtyping import Float, UInt8
from torch import Tensor, nn

from unclip.bundle import read_metadata, stage_file
from unclip.cascade import Cascade
from unclip.clip import ClipEmbedder
from unclip.evaluation import gallery, measures
from unclip.evaluation.counterfactuals import pair_probes
from unclip.evaluation.emoji_probes import concept_set, probes
from unclip.evaluation.enlargement import compare_enlargements, fresh_renders
from unclip.evaluation.features import EfficientNetLite0, extract
from unclip.evaluation.networks import load_judge
from unclip.evaluation.open_captions import choose_captions, measure_open
from unclip.evaluation.prior_gap import measure_gap
from unclip.evaluation.real import Real, read_real
from unclip.evaluation.sampling import Sampling
from unclip.evaluation.two_objects import Templates, measure_scenes, pairs, read_singles
from unclip.images import bicubic

if TYPE_CHECKING:
    from unclip.evaluation.benchmark import Benchmark

SPLITS = VALIDATION, SEEN, HELD_OUT = "val", "test_seen", "test_held_out"
NEEDS = {
    "clip": ("clip",),
    "prior": ("clip", "prior"),
    "decoder": ("clip", "prior", "decoder"),
    "prior_gap": ("clip", "prior", "decoder"),
    "two_objects": ("clip", "prior", "decoder"),
    "open_captions": ("clip", "prior", "decoder"),
    "judge": ("clip", "prior", "decoder", "judge"),
    "upsampler_256": ("upsampler_256",),
    "upsampler_1024": ("upsampler_1024",),
    "pictures": ("clip", "prior", "decoder"),
}
FOLLOWS = {  # whose results or images each part uses
    "decoder": "prior",
    "prior_gap": "decoder",
    "two_objects": "decoder",
    "judge": "decoder",
}


class Given(NamedTuple):
    """Pictures of the seen compositions' captions that another part of an evaluation has made.

    Attributes:
        images: the decoder's, of 64 px.
        features: EfficientNet-Lite0's of them ("prior"), of the pictures that they stand for
            ("real") and of the validation's ("reference"); empty where nobody has asked for them.
    """

    images: UInt8[Tensor, "count 3 64 64"]
    features: dict[str, Float[Tensor, "count features"]]


class Parts:
    """One benchmark of one bundle: a method a part, their results side by side."""

    def __init__(
        self,
        benchmark: "Benchmark",
        cascade: Cascade,
        root: Path,
        out: Path,
        given: Given | None = None,
    ) -> None:
        self.benchmark = benchmark
        self.seed = benchmark.settings.seed
        self.cascade = cascade
        self.sampling = Sampling(benchmark.settings, cascade)
        self.given = given
        self.root = root
        self.out = out
        self.results: dict[str, Any] = {}
        self.paths: list[Path] = []
        self.concept_set = concept_set(root)
        self._predicted: dict[str, Tensor] = {}  # image embeddings by split
        self._features: dict[str, Tensor] = {}  # EfficientNet-Lite0's by what they show
        self._generated: dict[str, Tensor] = {}  # pictures by split

    def file(self, stage: str) -> Path:
        """Where the bundle has a stage, or should."""
        return stage_file(self.cascade.folder, stage)

    @cached_property
    def real(self) -> dict[str, Real]:
        """64 px renders of each split: as many of the validation's as of the seen compositions."""
        benchmark = self.benchmark
        wanted = {
            VALIDATION: max(benchmark.pictures, benchmark.recall_among),
            SEEN: benchmark.pictures,
            HELD_OUT: benchmark.held_out,
        }
        return {split: read_real(self.root, split, 64, count=n) for split, n in wanted.items()}

    @cached_property
    def singles(self) -> Real:
        """64 px training renders of one object, of emoji scenes only."""
        return read_singles(self.root)

    @cached_property
    def templates(self) -> Templates:
        """Crops that name the concepts of objects."""
        return Templates.cut(self.singles, self.concept_set)

    @cached_property
    def judge_clip(self) -> ClipEmbedder:
        """The CLIP that no stage has seen."""
        return load_judge(self.cascade.folder, self.cascade.embedder)

    def stages(self) -> dict[str, dict[str, Any]]:
        """What each file of the bundle says of itself."""
        described = {}
        for name in ("clip", "judge", "prior", "decoder", "upsampler_256", "upsampler_1024"):
            if not self.file(name).is_file():
                continue
            written = read_metadata(self.file(name))
            described[name] = {
                "parameters": self._parameters(name),
                "steps": written.steps,
                "images": written.extra.get("images"),
                "seconds": written.extra.get("seconds"),
                "version": written.version,
                "clip_fingerprint": written.clip_fingerprint,
            }
        return described

    def clip(self) -> None:
        """Retrieval recall of the model's CLIP and of the judge, and their choices for renders."""
        clips = {"clip": self.cascade.embedder}
        if self.file("judge").is_file():
            clips["judge"] = self.judge_clip
        among = self.benchmark.recall_among
        self.results["clip"] = {
            name: measures.clip_recall(clip, self.real[VALIDATION], among=among)
            for name, clip in clips.items()
        }
        if self.concept_set:
            for name, clip in clips.items():
                self.results["clip"][name]["choices"] = {
                    split: measures.answers(
                        clip, measures.embed_images(clip, real.images), self._probes(real)
                    )
                    for split, real in self.real.items()
                }

    def _probes(self, real: Real) -> dict[str, measures.Probe]:
        """Questions about single objects and pairs; none for data other than emoji scenes."""
        if not self.concept_set:
            return {}
        of_pairs = pair_probes(real.captions, real.metadata, self.concept_set)
        return {**probes(real.metadata, self.concept_set), **of_pairs}

    def prior(self) -> None:
        """Cosines of predicted to true image embeddings, on captions that training did not see."""
        self.results["prior"] = {}
        for split in (HELD_OUT, SEEN):
            real = self.real[split]
            self._predicted[split] = self.sampling.predict(real.captions)
            self.results["prior"][split] = measures.prior_cosines(
                self._predicted[split],
                measures.embed_images(self.cascade.embedder, real.images),
                measures.embed_texts(self.cascade.embedder, real.captions),
                real.captions,
                linear=self._linear(real.captions),
                among=self.benchmark.recall_among,
                seed=self.seed,
            )

    def _linear(self, captions: Sequence[str]) -> Tensor | None:
        """The linear map's image embeddings; None where the prior was trained without it."""
        if self.cascade.stage("prior").linear is None:
            return None
        return self.cascade.prior(captions, seeds=range(len(captions)), prior="linear")

    def decoder(self) -> None:
        """Fréchet distances to the validation pictures; keeps the generated pictures."""
        real, reference = self.real[SEEN], self.real[VALIDATION].images
        n = min(len(real), len(reference))
        self._generated = {
            SEEN: self._decode(SEEN) if self.given is None else self.given.images,
            HELD_OUT: self._decode(HELD_OUT),
        }
        untrained = self.sampling.untrained(
            self._predicted[SEEN], real.captions, steps=self.benchmark.untrained_steps
        )
        self._features |= {} if self.given is None else self.given.features
        features = {
            name: self._extract(name, images[:n])
            for name, images in {
                "reference": reference,
                "real": real.images,
                "prior": self._generated[SEEN],
                "untrained": untrained,
            }.items()
        }
        self.results["decoder"] = {
            "fd_effnet_lite0": {
                **measures.frechet_distances(
                    {name: features[name] for name in ("real", "prior", "untrained")},
                    features["reference"],
                    resamples=self.benchmark.resamples,
                    seed=self.seed,
                ),
                "n": n,
            },
            "reference": VALIDATION,
            "captions": SEEN,
            "feature_size": self.network.size,
        }

    def prior_gap(self) -> None:
        """What the decoder makes of each thing that it can start from."""
        self.results["decoder"]["prior_gap"] = measure_gap(
            self.sampling,
            self.real[SEEN],
            self._generated[SEEN],
            {name: self._features[name] for name in ("reference", "real", "prior")},
            self.network,
            self.judge_clip if self.file("judge").is_file() else None,
            count=self.benchmark.prior_gap,
            among=self.benchmark.captions_among,
            resamples=self.benchmark.resamples,
        )

    def two_objects(self) -> None:
        """Scenes of two objects that show what they state, from the prior's and from true z_i."""
        templates, found = self.templates, {}
        for split, real in self.real.items():
            shown = {"real": real}
            if split in self._generated:
                shown["generated"] = replace(real, images=self._generated[split])
                if rows := pairs(real.metadata):
                    shown["true_embedding"] = self._reconstructed(real.take(rows))
            found[split] = {
                source: measure_scenes(scenes, templates) for source, scenes in shown.items()
            }
        self.results["two_objects"] = found

    def _reconstructed(self, real: Real) -> Real:
        """The decoder's images of the true embeddings."""
        z = measures.embed_images(self.cascade.embedder, real.images)
        return replace(real, images=self.sampling.decode(z, real.captions))

    def open_captions(self) -> None:
        """Spread of each prior's samples for captions that leave the background open."""
        singles, templates = self.singles, self.templates
        linear = self.cascade.stage("prior").linear is not None
        priors = {"diffusion": True, "linear": linear, "ar": self.file("prior_ar").is_file()}
        self.results["open_captions"] = measure_open(
            self.sampling,
            [name for name, available in priors.items() if available],
            choose_captions(self.concept_set, self.benchmark.open_captions, seed=self.seed),
            singles,
            templates,
            seeds=self.benchmark.open_seeds,
        )

    def judge(self) -> None:
        """What the judge picks for generated pictures, beside the same for real ones."""
        self.results["judge"] = {}
        for split, generated in self._generated.items():
            real = self.real[split]
            asked = self._probes(real)
            self.results["judge"][split] = {
                source: measures.judge_choices(
                    self.judge_clip,
                    images,
                    real.captions,
                    asked,
                    among=self.benchmark.captions_among,
                    seed=self.seed,
                )
                for source, images in (("generated", generated), ("real", real.images))
            }

    def upsampler_256(self) -> None:
        """Compare enlargements from 64 to 256 px with bicubic ones."""
        self._upsampler("upsampler_256", 256, self.benchmark.upsampled_256)

    def upsampler_1024(self) -> None:
        """Compare enlargements from 256 to 1024 px with bicubic ones."""
        self._upsampler("upsampler_1024", 1024, self.benchmark.upsampled_1024)

    def pictures(self) -> None:
        """Contact sheets, and pictures of held-out captions in full size."""
        size = self.cascade.size
        if self.concept_set:
            self.paths += gallery.single_objects(
                self.sampling.text_to_image,
                self.concept_set,
                self.out,
                size=min(size, 256),
                most=self.benchmark.sheet_prompts,
            )
        real = self.real[HELD_OUT]
        captions = real.take(gallery.varied(real, self.benchmark.large_pictures)).captions
        self.paths += gallery.held_out(self.sampling.text_to_image, captions, self.out, size=size)

    @cached_property
    def network(self) -> EfficientNetLite0:
        """What distances are measured in."""
        return EfficientNetLite0().to(self.cascade.device)

    def _decode(self, split: str) -> Tensor:
        return self.sampling.decode(self._predicted[split], self.real[split].captions)

    def _extract(self, name: str, images: Tensor) -> Tensor:
        """Features of the pictures, computed once."""
        if name not in self._features or len(self._features[name]) != len(images):
            progress = self.benchmark.settings.progress
            self._features[name] = extract(self.network, images, progress=progress)
        return self._features[name]

    def _upsampler(self, stage: str, size: int, count: int) -> None:
        if self.benchmark.fresh:
            true = fresh_renders(self.root, size, count=count, seed=self.seed)
        else:
            true = read_real(self.root, SEEN, size, count=count).images
        low_res = bicubic(true, size // 4)
        enlarged = self.sampling.enlarge(low_res, size)
        self.results[stage] = compare_enlargements(
            enlarged,
            true,
            low_res,
            device=self.cascade.device,
            resamples=self.benchmark.resamples,
            seed=self.seed,
        )
        self.paths += gallery.enlargements(enlarged, true, low_res, self.out, stage=stage)

    def _parameters(self, name: str) -> int:
        if name in ("clip", "judge"):
            model: nn.Module = (self.cascade.embedder if name == "clip" else self.judge_clip).model
        else:
            model = self.cascade.stage(name)
        return sum(parameter.numel() for parameter in model.parameters())
