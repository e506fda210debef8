"""Agreement with the caption, by a CLIP that no stage was trained with."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from unclip.evaluation.judge import choose, distractors
from unclip.evaluation.scores import Evidence, Metric, Score, mean_score


@dataclass(frozen=True, kw_only=True)
class ClipScore(Metric):
    """100 times the cosine of picture and caption: never of the CLIP that the model is built on.

    Not multiplied by 2.5, nothing put before the caption.

    Args:
        network: a CLIP.
    """

    network: str
    needs_prompts = True

    def __call__(self, evidence: Evidence) -> dict[str, Score]:
        """The mean, and the same of each prompt's real picture."""
        text = evidence.texts[self.network]
        paired = evidence.paired.get(self.network)
        score = mean_score(
            _cosines(evidence.generated[self.network], text),
            seed=evidence.seed,
            better="higher",
            real=None if paired is None else float(_cosines(paired, text).mean()),
            n_real=None if paired is None else len(paired),
            about={"scale": 100},
        )
        return {f"clip_score_{self.network}": score}


@dataclass(frozen=True, kw_only=True)
class RetrievalPrecision(Metric):
    """CLIP R-precision: how often a CLIP ranks the own caption first among `among` (Park 2021).

    The distractors are other prompts of the same evaluation, all different in their words.

    Args:
        network: a CLIP.
        among: captions to choose from; all different ones where there are fewer.
    """

    network: str
    among: int = 100
    needs_prompts = True

    def __call__(self, evidence: Evidence) -> dict[str, Score]:
        """The share, and the same of each prompt's real picture."""
        text, prompts = evidence.texts[self.network], evidence.prompts
        among = min(self.among, len(set(prompts)))
        if among < 2:
            raise ValueError("to choose a caption needs two different ones")
        others = distractors(prompts, count=among - 1, seed=evidence.seed)
        rows = torch.cat([torch.arange(len(prompts))[:, None], others], dim=1)  # (N, among)

        def hits(images: Tensor) -> Bool[Tensor, " n"]:
            unit = F.normalize(text, dim=-1)
            first = torch.zeros(1, dtype=torch.int64)
            parts = [
                choose(images[part], unit[rows[part]], first.expand(len(rows[part])))
                for part in (slice(at, at + 256) for at in range(0, len(rows), 256))
            ]
            return torch.cat(parts)

        paired = evidence.paired.get(self.network)
        score = mean_score(
            hits(evidence.generated[self.network]),
            seed=evidence.seed,
            better="higher",
            real=None if paired is None else float(hits(paired).double().mean()),
            n_real=None if paired is None else len(paired),
            about={"among": among},
        )
        return {f"r_precision_{self.network}": score}


def _cosines(images: Tensor, texts: Tensor) -> Float[Tensor, " n"]:
    """100 · cos."""
    return 100 * F.cosine_similarity(images.double(), texts.double(), dim=-1)
