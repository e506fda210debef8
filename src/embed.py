"""Store CLIP image embeddings next to a data set's shards: `python src/embed.py scale=emoji`."""

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cli.config_check import check_command_line
from cli.training import build, ensure_inputs, exit_on_user_error, register_run_folder


@hydra.main(version_base="1.3", config_path="../conf", config_name="embed")
def main(cfg: DictConfig) -> None:
    """Embed the training and validation splits; shards with embeddings are skipped."""
    import unclip  # isort: skip # noqa: F401 (first: lets torchvision load next to a CPU torch)

    from lightning.pytorch.callbacks import TQDMProgressBar

    from unclip.training.embeddings import ShardEmbedding, reader_settings
    from unclip.training.trainer import silence_lightning

    cfg.run_folder = HydraConfig.get().runtime.output_dir
    silence_lightning()
    with exit_on_user_error():
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        ensure_inputs(config, HydraConfig.get().overrides.task)
        embedder = build(config["embedder"]["build"])
        data = build(config["data"])()
        module = ShardEmbedding(embedder, data.sources(), **reader_settings(data))
        trainer = build(config["trainer"])(callbacks=[TQDMProgressBar()], loggers=[])
        trainer.predict(module, return_predictions=False)
    rate = f", {module.images / module.seconds:.0f} images/s" if module.images else ""
    print(
        f"rank {trainer.global_rank}: embedded {module.shards} shards of {data.root} "
        f"with CLIP {embedder.fingerprint}{rate}"
    )


register_run_folder()
if __name__ == "__main__":
    check_command_line("embed")
    main()
