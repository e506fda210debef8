"""Stores CLIP image embeddings beside a data set's shards: `python src/embed.py scale=emoji`."""

import unclip  # isort: skip # noqa: F401 (first: torchvision then imports beside a CPU torch)

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from train import build, prepare
from unclip.training.embeddings import embed_shards


@hydra.main(version_base="1.3", config_path="../conf", config_name="embed")
def main(cfg: DictConfig) -> None:
    """Embeds the training and validation splits; what is there already is left alone."""
    cfg.run_folder = HydraConfig.get().runtime.output_dir
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    try:
        prepare(config, HydraConfig.get().overrides.task)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        embedder = build(config["embedder"]["build"]).to(device)
        data = build(config["data"])()
        shards = embed_shards(embedder, data.sources(), workers=data.workers)
    except (FileNotFoundError, ChildProcessError) as error:  # their text says what to do
        raise SystemExit(f"embed.py: {error}") from None
    print(f"embedded {shards} shards of {data.root} with CLIP {embedder.fingerprint}")


if __name__ == "__main__":
    main()
