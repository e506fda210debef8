"""Stores CLIP image embeddings beside a data set's shards: `python src/embed.py scale=emoji`."""

import unclip  # isort: skip # noqa: F401 (first: torchvision then imports beside a CPU torch)

import hydra
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import TQDMProgressBar
from omegaconf import DictConfig, OmegaConf

from configuration import check_command_line
from train import build, prepare
from unclip.training.embeddings import ShardEmbedding, reading_of
from unclip.training.trainer import quieten


@hydra.main(version_base="1.3", config_path="../conf", config_name="embed")
def main(cfg: DictConfig) -> None:
    """Embeds the training and validation splits; what is there already is left alone."""
    cfg.run_folder = HydraConfig.get().runtime.output_dir
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    quieten()
    try:
        prepare(config, HydraConfig.get().overrides.task)
        embedder = build(config["embedder"]["build"])
        data = build(config["data"])()
        module = ShardEmbedding(embedder, data.sources(), **reading_of(data))
        trainer = build(config["trainer"])(callbacks=[TQDMProgressBar()], loggers=[])
        trainer.predict(module, return_predictions=False)
    except (FileNotFoundError, ChildProcessError) as error:  # their text says what to do
        raise SystemExit(f"embed.py: {error}") from None
    rate = f", {module.images / module.seconds:.0f} images/s" if module.images else ""
    print(
        f"rank {trainer.global_rank}: embedded {module.shards} shards of {data.root} "
        f"with CLIP {embedder.fingerprint}{rate}"
    )


if __name__ == "__main__":
    check_command_line("embed")
    main()
