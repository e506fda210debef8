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

from cli.config_check import check_command_line
from unclip.evaluation.evaluation import Evaluation
from unclip.evaluation.parts import SPLITS
from unclip.evaluation.ranks import joined, start_ranks


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(cfg: DictConfig) -> float | None:
    """Evaluates, writes the report into OUT, and returns the headline's number."""
    start_ranks(cfg.trainer.get("devices", 1))
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    job = HydraConfig.get().job.num if sweep else None
    try:
        ranks = joined()
        with open_dict(cfg):
            if cfg.trainer.get("accelerator") == "cpu":
                cfg.device = "cpu"
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
    """Whether each stage is measured by itself, too; by default where the data have its splits."""
    if cfg.by_stage is not None:
        return cfg.by_stage
    if sweep or cfg.generated is not None or cfg.protocol.format != "shards":
        return False
    return all((Path(cfg.data.root) / split).is_dir() for split in SPLITS)


def report(outcome: Any, cfg: DictConfig, sweep: bool) -> float | None:
    """Writes and prints what was found."""
    from unclip.evaluation.publish import publish

    loggers = [instantiate(logger) for logger in cfg.logger.values()]
    return publish(outcome, Path(cfg.out), sweep=sweep, loggers=loggers)


if __name__ == "__main__":
    check_command_line("evaluate")
    main()
