"""Agreement with the caption, measured by a CLIP that no stage was trained with."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unclip.evaluation.choices import choose_own
from unclip.evaluation.context import Context
from unclip.evaluation.features import Features
from unclip.evaluation.measurement import Measurement, Result, mean_score


class ClipScore(Measurement):
    """100 times the cosine of image and caption, by a CLIP that the model is not built on.

    It is not multiplied by 2.5, and captions get no prefix.
    """

    network: str  # name of a CLIP network

    def __call__(self, context: Context) -> Result:
        """Average it over the images; the baseline is that of each prompt's real image."""
        texts = context.texts(self.network)

        def cosines(images: Features) -> Float[Tensor, " n"]:
            return 100 * F.cosine_similarity(images.double(), texts.double(), dim=-1)

        ours, paired = context.features(self.network), context.paired_features(self.network)
        real, about = None if paired is None else cosines(paired), {"scale": 100}
        score = mean_score(cosines(ours), seed=context.seed, real=real, about=about)
        return Result({f"clip_score_{self.network}": score})


class RetrievalPrecision(Measurement):
    """CLIP R-precision: how often a CLIP ranks the own caption first (Park 2021).

    The distractors are other prompts of the same evaluation with different texts.
    """

    network: str  # name of a CLIP network
    among: int = 100  # number of captions to choose from; all different ones if there are fewer

    def __call__(self, context: Context) -> Result:
        """Compute the share; the baseline is that of each prompt's real image."""
        texts, prompts = F.normalize(context.texts(self.network), dim=-1), context.prompts
        among = min(self.among, len(set(prompts)))
        if among < 2:
            raise ValueError("a choice needs at least two different captions")
        options: dict[str, int] = {"among": among, "seed": context.seed}
        paired = context.paired_features(self.network)
        score = mean_score(
            choose_own(context.features(self.network), texts, prompts, **options),
            seed=context.seed,
            real=None if paired is None else choose_own(paired, texts, prompts, **options),
            about={"among": among},
        )
        return Result({f"r_precision_{self.network}": score})
