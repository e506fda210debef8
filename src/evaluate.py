"""Measures a bundle: `python src/evaluate.py model=models/emoji data=emoji metrics=offline`."""

import sys
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from unclip.evaluation.report import summary, write_results


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Runs the metrics on the bundle, writes OUT/results.json and prints what it says."""
    benchmark = instantiate(cfg.metrics, _convert_="all")
    try:
        results = benchmark(cfg.model, cfg.data.root, cfg.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    path = write_results(results, Path(cfg.out) / "results.json")
    print(f"{summary(results)}\n\nresults: {path}")


if __name__ == "__main__":
    main()
