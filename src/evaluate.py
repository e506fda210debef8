"""Measure a bundle or a folder of images: `python src/evaluate.py model=models/emoji`."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from cli import refuse_shipped
from cli.config_check import check_command_line


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(cfg: DictConfig) -> float | None:
    """Measure, write the report to OUT, and return the protocol's main number."""
    import unclip  # isort: skip # noqa: F401 (first: torchvision then works with a CPU torch)
    from hydra.utils import instantiate

    from unclip.device import set_up_device
    from unclip.evaluation.distributed import launch
    from unclip.evaluation.measurement import run
    from unclip.evaluation.report import collect, publish
    from unclip.model_card import write_model_card

    started = time.perf_counter()
    set_up_device()
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        ranks = launch(
            cfg.trainer.get("devices", 1),
            cfg.trainer.get("accelerator", "auto"),
            cfg.trainer.get("num_nodes", 1),
        )
        with open_dict(cfg):
            if cfg.trainer.get("accelerator") == "cpu":
                cfg.device = "cpu"
            # Ranks share the folder, because that of a sweep is named by the time.
            cfg.out = ranks.share(str(output_folder(cfg, sweep)))
        refuse_shipped(cfg.out, "add out=DIR")
        measurements = choose(instantiate(cfg.measure, _convert_="all"), cfg, sweep)
        context = instantiate(cfg.context, _convert_="all")(ranks=ranks)
        found = run(measurements, context)
        if found is None:  # another rank writes the report
            return None
        seconds = time.perf_counter() - started
        report = collect(found, measurements, context, model=cfg.model, seconds=seconds)
        loggers = [instantiate(logger) for logger in cfg.logger.values()]
        objective = publish(report, Path(cfg.out), sweep=sweep, loggers=loggers)
        if cfg.out == cfg.model:
            write_model_card(Path(cfg.model))
        return objective
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def output_folder(cfg: DictConfig, sweep: bool) -> Path:
    """Return the folder of the results; each job of a sweep has its own."""
    if sweep:
        return Path(cfg.out or HydraConfig.get().sweep.dir) / str(HydraConfig.get().job.num)
    return Path(cfg.out or cfg.generated or cfg.model)


def choose(measurements: Mapping[str, Any], cfg: DictConfig, sweep: bool) -> dict[str, Any]:
    """Return the measurements to run, as `only` and `by_stage` say.

    Raises:
        ValueError: `only` names an unknown measurement.
    """
    chosen = {name: one for name, one in measurements.items() if one is not None}
    if unknown := set(cfg.only or ()) - chosen.keys():
        raise ValueError(f"only={min(unknown)}: the measurements are {', '.join(chosen)}")
    if cfg.only is not None:
        return {name: chosen[name] for name in cfg.only}
    by_stage = cfg.by_stage
    if by_stage is None:
        by_stage = not sweep and cfg.generated is None
    return {name: one for name, one in chosen.items() if by_stage or not one.stages}


if __name__ == "__main__":
    check_command_line("evaluate")
    main()
