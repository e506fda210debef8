"""The offline benchmark: every stage of a bundle measured on one data set, without a download."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unclip.bundle import train_command
from unclip.cascade import Cascade
from unclip.evaluation.parts import FOLLOWS, NEEDS, SEEN, VALIDATION, Given, Parts
from unclip.evaluation.protocol import Protocol
from unclip.evaluation.sampling import Settings


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Measures a bundle and draws its pictures; what a missing stage would say is left out.

    Picture k of a split is made from that split's caption k with the seed `seed` + k, so that a
    number depends neither on the batch size nor on the other settings.

    Args:
        pictures: of the seen compositions, for the Fréchet distance and the judge: n on both sides.
        held_out: pictures of held-out compositions, for the judge.
        prior_gap: pictures of each other thing that a decoder can start from (section 5.1).
        open_captions: captions that leave the background open, for the priors' spread.
        open_seeds: samples of each of them.
        upsampled_256: true renders that the first upsampler is measured on.
        upsampled_1024: the second one's.
        fresh: render new scenes for the upsamplers, which no data set has, in place of the first
            ones of the seen compositions' split.
        recall_among: candidates of CLIP's retrieval recall.
        captions_among: captions that the judge chooses from.
        untrained_steps: of the untrained decoder, which starts as a constant and samples unguided.
        resamples: of the bootstrap that gives distances their errors.
        sheet_prompts: of each kind on the sheet of single objects.
        large_pictures: on the grid of held-out captions.
        settings: of every sample; its seed is that of all draws, too.
    """

    pictures: int = 500
    held_out: int = 128
    prior_gap: int = 66
    open_captions: int = 12
    open_seeds: int = 8
    upsampled_256: int = 48
    upsampled_1024: int = 16
    fresh: bool = False
    recall_among: int = 64
    captions_among: int = 16
    untrained_steps: int = 2
    resamples: int = 10
    sheet_prompts: int = 18
    large_pictures: int = 9
    settings: Settings = field(default_factory=Settings)

    def draws_as(self, protocol: Protocol) -> bool:
        """Whether a protocol's pictures are those of the seen compositions here."""
        return (
            (protocol.format, protocol.split, protocol.captions) == ("shards", SEEN, "first")
            and (protocol.resolution, protocol.reference) == (64, VALIDATION)
            and protocol.count == protocol.reference_count == self.pictures
            and protocol.repeats == 1
        )

    def __call__(
        self, cascade: Cascade, data: str | Path, out: str | Path, *, given: Given | None = None
    ) -> dict[str, Any]:
        """The results of a bundle on a data set; pictures go to OUT/pictures.

        A part whose stage, data or weights are missing is left out, with the reason.

        Args:
            cascade: the bundle, `models/NAME`.
            data: the folder with the splits val, test_seen and test_held_out.
            out: where the pictures go.
            given: the pictures of the seen compositions, where they are there already.

        Raises:
            ValueError: a file of either is damaged, or the judge is the model's own CLIP.
        """
        started = time.perf_counter()
        run = Parts(self, cascade, Path(data), Path(out) / "pictures", given)
        left_out, seconds = {}, {}
        for part in NEEDS:
            since = time.perf_counter()
            if why := left_out.get(FOLLOWS.get(part)) or _measure(run, part):
                left_out[part] = why
                continue
            seconds[part] = round(time.perf_counter() - since, 1)
            if self.settings.progress:
                tqdm.write(f"measured: {part} ({seconds[part]:.1f} s)")
        return {
            "stages": run.stages(),
            **run.results,
            "left_out": left_out,
            "paths": [str(path) for path in run.paths],
            "seconds": {**seconds, "total": round(time.perf_counter() - started, 1)},
            "settings": asdict(self),
        }


def _measure(run: Parts, part: str) -> str | None:
    """Measures a part; returns why it cannot be measured."""
    for name in NEEDS[part]:
        if not run.file(name).is_file():
            return f"{run.file(name)} is missing: `{train_command(name)}`"
    try:
        getattr(run, part)()
    except FileNotFoundError as error:
        run.results.pop(part, None)
        return str(error)
    return None
