"""Train a stage: `python src/train.py stage=decoder`; conf/train.yaml has the settings."""

import json
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cli import training
from cli.config_check import check_command_line


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Train the stage that the command line names, and return its validation metric."""
    from unclip.training.resume import lock_run_dir

    cfg.run_folder = HydraConfig.get().runtime.output_dir
    with training.exit_on_user_error():
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        training.check(config)
        training.ensure_inputs(config, HydraConfig.get().overrides.task)
        with lock_run_dir(Path(cfg.run_folder), restart=cfg.resume is None):
            return train(config, training.config_identity(cfg))


def train(config: dict[str, Any], identity: dict[str, Any]) -> float | None:
    """Build the parts of a run, whose `identity` must not change, and fit the stage."""
    training.set_up_process(config["seed"])
    from unclip.files import write_text
    from unclip.training.resume import FINISHED, find_checkpoint, keep_stable, resume_decay
    from unclip.training.run import ensure_embeddings

    folder, strict = Path(config["run_folder"]), config["resume_strict"]
    checkpoint = find_checkpoint(folder, config["resume"])
    decay_steps = config["schedule"].get("decay_steps", 0)
    checkpoint, decay = resume_decay(checkpoint, decay_steps, folder=folder, strict=strict)

    embedder = training.build_embedder(config)
    module = training.build_module(config, embedder, new=checkpoint is None)
    precomputed = embedder is not None and config["precompute_embeddings"]
    features = {"embeddings": embedder.fingerprint} if precomputed else {"load_image": True}
    data = training.build(config["data"])(**features)
    metadata = {
        "config": identity,
        "data_set": data.fingerprint(),
        "clip": module.clip_fingerprint,
        "decay": decay._asdict(),
    }
    trainer = training.open_trainer(config, metadata, checkpoint, decay.end)

    if precomputed:
        ensure_embeddings(embedder, data, trainer.strategy.root_device)
        embedder.drop_image_tower()
    if trainer.is_global_zero:
        write_text(folder / "config.yaml", OmegaConf.to_yaml(config))
        if decay.start is not None:
            keep_stable(checkpoint, decay, folder)
    trainer.fit(module, data, ckpt_path=checkpoint)
    measured = trainer.callback_metrics.get(config["objective"])
    objective = None if measured is None else float(measured)
    if trainer.is_global_zero:  # a sweep reads it
        result = {"name": config["objective"], "value": objective}
        write_text(folder / FINISHED, json.dumps(result) + "\n")
    return objective


if __name__ == "__main__":
    check_command_line("train")
    main()
