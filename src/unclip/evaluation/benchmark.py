"""The offline benchmark: every stage of a bundle measured on one data set, without a download."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unclip.bundle import train_command
from unclip.cascade import Cascade
from unclip.evaluation.parts import NEEDS, Parts
from unclip.evaluation.report import surroundings

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Measures a bundle and draws its pictures; what a missing stage would say is left out.

    Picture k of a split is made from that split's caption k with the seed `seed` + k, so that a
    number depends neither on the batch size nor on the other settings.

    Args:
        pictures: of the seen compositions, for the Fréchet distance and the judge: n on both sides.
        held_out: pictures of held-out compositions, for the judge.
        true_embeddings: pictures of true image embeddings, for the distance that the prior costs.
        upsampled_256: true renders that the first upsampler is measured on.
        upsampled_1024: the second one's.
        recall_among: candidates of CLIP's retrieval recall.
        captions_among: captions that the judge chooses from.
        guidance_scale: the decoder's; None is its own.
        prior_guidance_scale: the prior's; None is its own.
        steps: sampler steps of the stages named; None, and the others, are their own.
        untrained_steps: of the untrained decoder, which starts as a constant and samples unguided.
        resamples: of the bootstrap that gives distances their errors.
        sheet_prompts: of each kind on the sheet of single objects.
        large_pictures: on the grid of held-out captions.
        batch_size: pictures of 64 px at a time; larger pictures go in smaller batches.
        seed: of every sample.
        device: None is a GPU if there is one.
        progress: show a bar and a line for each part.
    """

    pictures: int = 500
    held_out: int = 128
    true_embeddings: int = 200
    upsampled_256: int = 48
    upsampled_1024: int = 8
    recall_among: int = 64
    captions_among: int = 16
    guidance_scale: float | None = None
    prior_guidance_scale: float | None = None
    steps: Mapping[str, int | None] = field(default_factory=dict)
    untrained_steps: int = 2
    resamples: int = 10
    sheet_prompts: int = 18
    large_pictures: int = 9
    batch_size: int = 50
    seed: int = 0
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        given = {stage: count for stage, count in self.steps.items() if count is not None}
        object.__setattr__(self, "steps", given)

    def __call__(self, model: str | Path, data: str | Path, out: str | Path) -> dict[str, Any]:
        """The results of a bundle on a data set; pictures go to OUT/pictures.

        Args:
            model: the bundle's folder, `models/NAME`.
            data: the folder with the splits val, test_seen and test_held_out.
            out: where the pictures go.

        Raises:
            FileNotFoundError: there is no bundle, or no data.
            ValueError: a file of either is damaged, or the judge is the model's own CLIP.
        """
        started = time.perf_counter()
        cascade = Cascade.load(model, device=self.device)
        run = Parts(self, cascade, Path(data), Path(out) / "pictures")
        left_out, seconds = {}, {}
        for part, needed in NEEDS.items():
            missing = [name for name in needed if not run.file(name).is_file()]
            if missing:
                left_out[part] = f"{run.file(missing[0])} is missing: `{train_command(missing[0])}`"
                continue
            since = time.perf_counter()
            getattr(run, part)()
            seconds[part] = round(time.perf_counter() - since, 1)
            if self.progress:
                tqdm.write(f"measured: {part} ({seconds[part]:.1f} s)")
        return {
            "format": FORMAT,
            "benchmark": "offline",
            "model": str(model),
            "data": str(data),
            "seed": self.seed,
            "stages": run.stages(),
            **run.results,
            "left_out": left_out,
            "paths": [str(path) for path in run.paths],
            "seconds": {**seconds, "total": round(time.perf_counter() - started, 1)},
            "settings": asdict(self),
            **surroundings(cascade.device),
        }
