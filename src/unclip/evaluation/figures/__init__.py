"""The paper's figures and tables, each drawn from a bundle: `src/reproduce.py figure=NAME`."""

from unclip.evaluation.figures.attack import TypographicAttack
from unclip.evaluation.figures.editing import Components, Interpolation, TextDiffs, Variations
from unclip.evaluation.figures.guidance import Guidance
from unclip.evaluation.figures.inversion import Inversion
from unclip.evaluation.figures.movement import Movement
from unclip.evaluation.figures.priors import PriorImportance, Priors

__all__ = [
    "Components",
    "Guidance",
    "Interpolation",
    "Inversion",
    "Movement",
    "PriorImportance",
    "Priors",
    "TextDiffs",
    "TypographicAttack",
    "Variations",
]
