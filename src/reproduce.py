"""Draws the paper's figures: `python src/reproduce.py figure=interpolation model=models/emoji`."""

import unclip  # isort: skip # noqa: F401 (first: torchvision then imports beside a CPU torch)

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from unclip.cascade import Cascade
from unclip.evaluation.figures.base import Figure, Studio
from unclip.evaluation.figures.gallery import command_of, write_figure


@hydra.main(version_base="1.3", config_path="../conf", config_name="reproduce")
def main(cfg: DictConfig) -> None:
    """Draws it into OUT, and the page of all that were drawn there."""
    name = HydraConfig.get().runtime.choices.figure
    overrides = [
        word
        for word in HydraConfig.get().overrides.task
        if word.partition("=")[0] not in ("figure", "device")
    ]
    try:
        figure: Figure = instantiate(cfg.figure, _convert_="all")
        cascade = Cascade.load(cfg.model, device=cfg.device)
        studio: Studio = instantiate(cfg.studio, _convert_="all")(cascade=cascade)
        drawn = figure(studio)
        fingerprints = {key: stage.fingerprint for key, stage in cascade.metadata.items()}
        made_with = {
            "bundle": fingerprints,
            "seed": cfg.seed,
            "size": cfg.size,
            "data": cfg.data.root,
        }
        command = command_of(name, overrides)
        written = write_figure(
            Path(cfg.out), name, figure, drawn, command=command, made_with=made_with
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
