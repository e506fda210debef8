"""How far text diffs move pictures towards their texts, by a CLIP that took no part in it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from unclip.evaluation.figures.base import Drawn, Figure, Studio, Table
from unclip.evaluation.figures.differences import differences


@dataclass(frozen=True, kw_only=True)
class Movement(Figure):
    """Args: pairs: of captions; strength: the last θ; frames: from 0 to it."""

    pairs: int
    strength: float
    frames: int

    title = "Text diffs, measured"
    about = (
        "A judge CLIP, which no stage has seen, embeds the 64 px pictures of each text diff. The "
        "margin is the cosine to the target caption minus that to the source caption; it should "
        "rise with θ. “nearer” is the share of pictures that are nearer to the target than to the "
        "source; “still like the picture” the cosine to the reconstruction."
    )

    def __call__(self, studio: Studio) -> Drawn:
        """Measures it."""
        real = studio.real(64)
        tasks = differences(real.metadata, self.pairs, seed=studio.seed)
        margins, likeness, target = [], [], []
        for task in tasks:
            made = studio.cascade.text_diff(
                real.images[task.row],
                task.source,
                task.target,
                strength=self.strength,
                frames=self.frames,
                seed=studio.seed,
                size=64,
                batch_size=studio.batch_size,
            ).images[64]
            z = studio.judged(made)
            texts = studio.judged_texts([task.target, task.source])
            cosines = z @ texts.T  # (frames, 2)
            target.append(cosines[:, 0])
            margins.append(cosines[:, 0] - cosines[:, 1])
            likeness.append(z @ z[0])
        margin, target = torch.stack(margins).double(), torch.stack(target).double()
        rows = self._rows(margin, target, torch.stack(likeness).double())
        head = ["θ", "cosine to the target", "margin", "± 95 %", "nearer", "still like the picture"]
        moved = margin[:, -1] > margin[:, 0]
        kinds = [
            [
                kind,
                float(margin[rows_of, -1].mean() - margin[rows_of, 0].mean()),
                float(moved[rows_of].double().mean()),
                int(rows_of.sum()),
            ]
            for kind in dict.fromkeys(task.changed for task in tasks)
            for rows_of in [torch.tensor([task.changed == kind for task in tasks])]
        ]
        return Drawn(
            {},
            {
                f"{len(tasks)} pairs": Table(head, rows),
                "by what changes": Table(["changed", "gain in margin", "moved", "pairs"], kinds),
            },
            "The mean margin "
            + ("rises at every step." if _rises(margin.mean(0)) else "does not rise at every step.")
            + f" {int(moved.sum())} of {len(tasks)} pictures moved towards their target.",
        )

    def _rows(self, margin: Tensor, target: Tensor, likeness: Tensor) -> list[list[str | float]]:
        rows = []
        for frame in range(self.frames):
            at, spread = margin[:, frame], margin[:, frame].std() / len(margin) ** 0.5
            theta = self.strength * frame / (self.frames - 1)
            numbers = (
                target[:, frame].mean(),
                at.mean(),
                1.96 * spread,
                (at > 0).double().mean(),
                likeness[:, frame].mean(),
            )
            rows.append([f"{theta:.2f}", *(float(number) for number in numbers)])
        return rows


def _rises(values: Tensor) -> bool:
    return bool((values.diff() > 0).all())
