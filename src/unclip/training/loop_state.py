"""Lightning's counters in a checkpoint, brought to a state that a run goes on from exactly.

Wherever a checkpoint is written, amid a step, in validation or after the last step, it says: so
many steps are done with all that belongs to them, and the next has not begun.
"""

from typing import Any

Counters = dict[str, int]


def at_whole_step(
    fit_loop: dict[str, Any], *, steps: int, epoch_batches: float, accumulated: int
) -> None:
    """Rewrites the state of Lightning's fit loop in place.

    Batches of a step that is not done are forgotten, and are had again.

    Args:
        fit_loop: `checkpoint["loops"]["fit_loop"]`.
        steps: optimizer steps that are done.
        epoch_batches: batches of an epoch.
        accumulated: batches of a step.
    """
    progress = fit_loop["epoch_loop.batch_progress"]
    batches, total = progress["current"]["processed"], progress["total"]["processed"]
    epoch = fit_loop["epoch_progress"]["total"]["started"] - 1
    if batches >= epoch_batches:
        epoch, batches = epoch + 1, 0
    unfinished = batches % accumulated
    batches, total = batches - unfinished, total - unfinished
    _all(progress["current"], batches)
    _all(progress["total"], total)
    progress["is_last_batch"] = False
    for counters in (fit_loop["epoch_progress"]["current"], fit_loop["epoch_progress"]["total"]):
        counters |= {"ready": epoch + 1, "started": epoch + 1}
        counters |= {"processed": epoch, "completed": epoch}
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]["total"]
    _all(validation, validation["completed"])
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps
    for loader in fit_loop["state_dict"].get("combined_loader", []):
        loader["batches"] = batches


def _all(counters: Counters, value: int) -> None:
    for name in counters:
        counters[name] = value
