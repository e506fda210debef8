"""Store CLIP image embeddings next to a data set's shards: `python src/embed.py scale=emoji`."""

import time

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cli import training
from cli.config_check import check_command_line, check_targets


@hydra.main(version_base="1.3", config_path="../conf", config_name="embed")
def main(cfg: DictConfig) -> None:
    """Embed the training and validation splits; shards with embeddings are skipped."""
    from unclip.device import resolve_dtype
    from unclip.evaluation.distributed import launch
    from unclip.training.run import embed_shards

    cfg.run_folder = HydraConfig.get().runtime.output_dir
    with training.exit_on_user_error():
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        check_targets(config)
        training.ensure_inputs(config, HydraConfig.get().overrides.task)
        settings = config["trainer"]
        ranks = launch(settings["devices"], settings["accelerator"], settings.get("num_nodes", 1))
        training.set_up_process(config["seed"])
        device = ranks.device("cpu" if settings["accelerator"] == "cpu" else None)
        dtype = resolve_dtype(config["embedder"]["dtype"], device)
        embedder = training.build(config["embedder"]["build"]).to(device, dtype)
        data = training.build(config["data"])()
        started = time.perf_counter()
        done = embed_shards(embedder, data, rank=ranks.rank, world_size=ranks.world)
        speed = done.images / (time.perf_counter() - started)
        print(
            f"rank {ranks.rank}: embedded {done.shards} shards of {data.root} with CLIP "
            f"{embedder.fingerprint}, {speed:.0f} images/s"
        )
        ranks.wait()


if __name__ == "__main__":
    check_command_line("embed")
    main()
