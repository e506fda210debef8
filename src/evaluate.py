"""Measures a bundle, or any pictures: `python src/evaluate.py model=models/emoji data=emoji`."""

import unclip  # isort: skip # noqa: F401 (first: torchvision then imports beside a CPU torch)

import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from unclip.evaluation.evaluation import Evaluation
from unclip.evaluation.ranks import joined


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(cfg: DictConfig) -> float | None:
    """Evaluates, writes the report into OUT, and returns the headline's number."""
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    job = HydraConfig.get().job.num if sweep else None
    try:
        with joined() as ranks, open_dict(cfg):
            cfg.out = ranks.share(str(place(cfg, job)))  # a sweep's folder is named by the time
            if not by_stage(cfg, sweep):
                cfg.evaluation.benchmark = None
            evaluation: Evaluation = instantiate(cfg.evaluation, _convert_="all")
            outcome = evaluation(
                data=cfg.data.root,
                out=cfg.out,
                model=cfg.model,
                generated=cfg.generated,
                ranks=ranks,
            )
        return None if outcome is None else report(outcome, cfg, sweep)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def place(cfg: DictConfig, job: int | None) -> Path:
    """The folder that takes the results: in a sweep, one for each job."""
    if job is not None:
        return Path(cfg.out or HydraConfig.get().sweep.dir) / str(job)
    return Path(cfg.out or cfg.generated or cfg.model)


def by_stage(cfg: DictConfig, sweep: bool) -> bool:
    """Whether each stage is measured by itself, too."""
    if cfg.by_stage is not None:
        return cfg.by_stage
    return not sweep and cfg.generated is None and cfg.protocol.format == "shards"


def report(outcome: Any, cfg: DictConfig, sweep: bool) -> float | None:
    """Writes and prints what was found."""
    from unclip.evaluation.publish import publish

    loggers = [instantiate(logger) for logger in cfg.logger.values()]
    return publish(outcome, Path(cfg.out), sweep=sweep, loggers=loggers)


if __name__ == "__main__":
    main()
