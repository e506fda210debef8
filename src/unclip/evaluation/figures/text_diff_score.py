"""How far text diffs move images toward their target captions, measured by the judge."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from unclip.emoji.caption_pairs import CaptionPair, caption_pairs
from unclip.evaluation.context import SEEN, Context
from unclip.evaluation.figures.figure import Figure, judge_images, judge_texts
from unclip.evaluation.measurement import Z95, Result, Table

Cosines = Float[Tensor, "pairs frames"]


@dataclass(frozen=True, kw_only=True)
class TextDiffScore(Figure):
    """Margin of the target caption over the source caption along text diffs.

    Args:
        pairs: number of caption pairs.
        strength: last angle θ.
        frames: number of angles from 0 to `strength`.
    """

    pairs: int
    strength: float
    frames: int
    size: int = 64

    title: ClassVar[str] = "Text diffs, measured"
    stages: ClassVar[tuple[str, ...]] = ("clip", "decoder", "judge")

    def __call__(self, context: Context) -> Result:
        """Score each frame of each text diff."""
        real = context.real(SEEN)
        tasks = caption_pairs(real.metadata, self.pairs, seed=context.seed)
        margins, similarities, targets = [], [], []
        for task in tasks:
            made = context.cascade.text_diff(
                real.images[task.row],
                task.source,
                task.target,
                strength=self.strength,
                frames=self.frames,
                **self.options(context),
            ).images[self.size_in(context)]
            z = judge_images(context, made)
            cosines = z @ judge_texts(context, [task.target, task.source]).T  # (frames, 2)
            targets.append(cosines[:, 0])
            margins.append(cosines[:, 0] - cosines[:, 1])
            similarities.append(z @ z[0])
        margin, target, similarity = (
            torch.stack(rows).double() for rows in (margins, targets, similarities)
        )
        head = ["θ", "cosine to the target", "margin", "± 95%", "closer to target"]
        head.append("cosine to the reconstruction")
        rows = [self._row(margin, target, similarity, frame) for frame in range(self.frames)]
        tables = {
            f"{len(tasks)} pairs": Table(head, rows),
            "By the part that changes": _changes(tasks, margin),
        }
        rises = bool((margin.mean(0).diff() > 0).all())
        moved = int((margin[:, -1] > margin[:, 0]).sum())
        note = (
            "The margin is the judge's cosine to the target caption minus that to the source "
            "caption; it should increase with θ. The mean margin "
            f"{'increases' if rises else 'does not increase'} at every step. {moved} of "
            f"{len(tasks)} images moved toward their target."
        )
        return Result(tables=tables, note=note)

    def _row(self, margin: Cosines, target: Cosines, similarity: Cosines, frame: int) -> list[Any]:
        """Return the table row of one angle."""
        of_frame = margin[:, frame]
        numbers = (
            target[:, frame].mean(),
            of_frame.mean(),
            Z95 * of_frame.std() / len(margin) ** 0.5,
            (of_frame > 0).double().mean(),
            similarity[:, frame].mean(),
        )
        theta = self.strength * frame / (self.frames - 1)
        return [f"{theta:.2f}", *map(float, numbers)]


def _changes(tasks: list[CaptionPair], margin: Cosines) -> Table:
    """Return the gain in margin for each part of the caption that changes."""
    rows, gain = [], margin[:, -1] - margin[:, 0]
    for kind in dict.fromkeys(task.changed for task in tasks):
        chosen = gain[[task.changed == kind for task in tasks]]
        moved = (chosen > 0).double().mean()
        rows.append([kind, float(chosen.mean()), float(moved), len(chosen)])
    return Table(["changed", "gain in margin", "moved toward the target", "pairs"], rows)
