"""The paper's figures and tables: `src/evaluate.py measure=paper`."""

from unclip.evaluation.figures.edits import Components, Interpolation, TextDiffs, Variations
from unclip.evaluation.figures.guidance_tradeoff import Guidance
from unclip.evaluation.figures.inversion import Inversion
from unclip.evaluation.figures.priors import PriorImportance, Priors
from unclip.evaluation.figures.text_diff_score import TextDiffScore
from unclip.evaluation.figures.typographic_attack import TypographicAttack

__all__ = [
    "Components",
    "Guidance",
    "Interpolation",
    "Inversion",
    "PriorImportance",
    "Priors",
    "TextDiffScore",
    "TextDiffs",
    "TypographicAttack",
    "Variations",
]
