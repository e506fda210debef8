"""The paper's figures and tables: `src/evaluate.py measure=paper`."""

from unclip.evaluation.figures.edit_scores import Inversion, TextDiffScore, TypographicAttack
from unclip.evaluation.figures.edits import Components, Interpolation, TextDiffs, Variations
from unclip.evaluation.figures.priors import Guidance, PriorImportance, Priors

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
