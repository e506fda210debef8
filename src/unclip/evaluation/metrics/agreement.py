"""Agreement with the caption, measured by a CLIP that no stage was trained with."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from unclip.evaluation.choices import choose, distractors
from unclip.evaluation.context import Context
from unclip.evaluation.measurement import Measurement, Result, mean_score


@dataclass(frozen=True, kw_only=True)
class ClipScore(Measurement):
    """100 times the cosine of image and caption, by a CLIP that the model is not built on.

    It is not multiplied by 2.5, and captions get no prefix.

    Args:
        network: name of a CLIP network.
    """

    network: str

    def __call__(self, context: Context) -> Result:
        """Average it over the images; the baseline is that of each prompt's real image."""
        text = context.texts(self.network)
        paired = context.features(self.network, "paired")
        score = mean_score(
            _cosines(context.features(self.network), text),
            seed=context.seed,
            better="higher",
            baseline=None if paired is None else float(_cosines(paired, text).mean()),
            n_real=None if paired is None else len(paired),
            about={"scale": 100},
        )
        return Result({f"clip_score_{self.network}": score})


@dataclass(frozen=True, kw_only=True)
class RetrievalPrecision(Measurement):
    """CLIP R-precision: how often a CLIP ranks the own caption first (Park 2021).

    The distractors are other prompts of the same evaluation with different texts.

    Args:
        network: name of a CLIP network.
        among: number of captions to choose from; all different ones if there are fewer.
    """

    network: str
    among: int = 100

    def __call__(self, context: Context) -> Result:
        """Compute the share; the baseline is that of each prompt's real image."""
        text, prompts = context.texts(self.network), context.prompts
        among = min(self.among, len(set(prompts)))
        if among < 2:
            raise ValueError("a choice needs at least two different captions")
        others = distractors(prompts, count=among - 1, seed=context.seed)
        rows = torch.cat([torch.arange(len(prompts))[:, None], others], dim=1)  # (N, among)

        def hits(images: Tensor) -> Bool[Tensor, " n"]:
            unit = F.normalize(text, dim=-1)
            first = torch.zeros(1, dtype=torch.int64)
            parts = [
                choose(images[part], unit[rows[part]], first.expand(len(rows[part])))
                for part in (slice(start, start + 256) for start in range(0, len(rows), 256))
            ]
            return torch.cat(parts)

        paired = context.features(self.network, "paired")
        score = mean_score(
            hits(context.features(self.network)),
            seed=context.seed,
            better="higher",
            baseline=None if paired is None else float(hits(paired).double().mean()),
            n_real=None if paired is None else len(paired),
            about={"among": among},
        )
        return Result({f"r_precision_{self.network}": score})


def _cosines(images: Tensor, texts: Tensor) -> Float[Tensor, " n"]:
    return 100 * F.cosine_similarity(images.double(), texts.double(), dim=-1)
