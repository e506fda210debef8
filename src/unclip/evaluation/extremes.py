"""The pictures worth looking at: the best, the worst, and some that nobody chose."""

from unclip.evaluation.evaluation import Outcome
from unclip.evaluation.folder import Generated

Chosen = list[tuple[Generated, float | None]]


def extremes(outcome: Outcome, *, count: int = 12) -> dict[str, Chosen]:
    """Pictures with their number, by a title: the first ones, then by CLIP score if there is one.

    Args:
        outcome: of an evaluation.
        count: pictures under each title.
    """
    rows = outcome.folder.rows
    found: dict[str, Chosen] = {"the first": [(row, None) for row in rows[:count]]}
    for name, score in outcome.scored.scores.items():
        if name.startswith("clip_score") and score.rows is not None:
            order = score.rows.argsort(stable=True).tolist()
            values = score.rows.tolist()
            found[f"highest {name}"] = [(rows[k], values[k]) for k in reversed(order[-count:])]
            found[f"lowest {name}"] = [(rows[k], values[k]) for k in order[:count]]
            break
    return found
