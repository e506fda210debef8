"""An evaluation's numbers, tables and pictures for a logger of Lightning's (wandb or CSV)."""

from typing import Any

from unclip.evaluation.evaluation import Outcome
from unclip.evaluation.extremes import extremes
from unclip.evaluation.report import GAP_HEAD, SCORE_HEAD, gap_rows, score_rows


def track(logger: Any, outcome: Outcome) -> None:
    """Logs scores by their key, and where the logger can, the table and the extreme pictures."""
    results = outcome.results
    key = results["key"]
    logger.log_hyperparams({"key": key, **results["protocol"], "made_with": results["made_with"]})
    numbers = {f"{key}/{name}": score["value"] for name, score in results["scores"].items()}
    logger.log_metrics(numbers)
    if hasattr(logger, "log_table"):
        logger.log_table(key=f"{key}/scores", columns=SCORE_HEAD, data=score_rows(results))
        if gap := results.get("decoder", {}).get("prior_gap"):
            logger.log_table(key=f"{key}/prior_gap", columns=GAP_HEAD, data=gap_rows(gap))
    if hasattr(logger, "log_image"):
        for title, chosen in extremes(outcome).items():
            logger.log_image(
                key=f"{key}/{title}",
                images=[str(picture.path) for picture, _ in chosen],
                caption=[picture.prompt or picture.id for picture, _ in chosen],
            )
    logger.save()
    logger.finalize("success")
