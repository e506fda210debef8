"""Train a stage: `python src/train.py stage=decoder`; conf/train.yaml has the settings."""

import json
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from cli.config_check import ConfigurationError, check_command_line
from cli.training import (
    build,
    check,
    config_identity,
    ensure_inputs,
    exit_on_user_error,
    register_run_folder,
)


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Train the stage that the command line names, and return its validation metric."""
    from unclip.training.resume import lock_run_dir

    cfg.run_folder = HydraConfig.get().runtime.output_dir
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    with exit_on_user_error():
        check(config)
        ensure_inputs(config, HydraConfig.get().overrides.task)
        with lock_run_dir(Path(cfg.run_folder), restart=cfg.resume is None):
            return train(config, config_identity(cfg))


def train(config: dict[str, Any], identity: dict[str, Any]) -> float | None:
    """Build the parts of a run, and fit the stage.

    Args:
        config: resolved configuration.
        identity: part of it that must not change when the run resumes.
    """
    set_up_process(config["seed"])
    from unclip.training.embeddings import check_sizes, ensure_embeddings
    from unclip.training.resume import FINISHED, find_checkpoint, keep_stable, resume_decay

    folder, strict = Path(config["run_folder"]), config["resume_strict"]
    checkpoint = find_checkpoint(folder, config["resume"])
    decay_steps = config["schedule"].get("decay_steps", 0)
    checkpoint, decay = resume_decay(checkpoint, decay_steps, folder=folder, strict=strict)

    embedder = build(config["embedder"]["build"]) if config["needs_clip"] else None
    if embedder is not None:
        check_sizes(embedder, config["clip"])
    module = build_module(config, embedder, new=checkpoint is None)
    precomputed = embedder is not None and config["precompute_embeddings"]
    features = {"embeddings": embedder.fingerprint} if precomputed else {"load_image": True}
    data = build(config["data"])(**features)
    metadata = {
        "config": identity,
        "data_set": data.fingerprint(),
        "clip": embedder and embedder.fingerprint,
        "decay": decay._asdict(),
    }
    if decay.end is not None:
        config["trainer"] |= {"max_steps": decay.end, "max_steps_multiplier": 1.0}
    trainer = build_trainer(config, metadata, checkpoint)

    if precomputed:
        ensure_embeddings(embedder, data, trainer.strategy.root_device)
    if trainer.is_global_zero:
        OmegaConf.save(config, folder / "config.yaml")
        if decay.start is not None:
            keep_stable(checkpoint, decay, folder)
    trainer.fit(module, data, ckpt_path=checkpoint)
    measured = trainer.callback_metrics.get(config["objective"])
    objective = None if measured is None else float(measured)
    if trainer.is_global_zero:  # a sweep reads it
        result = {"name": config["objective"], "value": objective}
        (folder / FINISHED).write_text(json.dumps(result) + "\n")
    return objective


def set_up_process(seed: int) -> None:
    """Configure logging, memory and random numbers of this process."""
    import torch

    from unclip.training.resume import is_first_rank
    from unclip.training.trainer import die_with_parent, silence_lightning, tune_malloc

    silence_lightning()
    tune_malloc()
    if not is_first_rank():
        die_with_parent()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(seed)  # the same initial weights on all ranks


def build_module(config: dict[str, Any], embedder: Any, *, new: bool) -> Any:
    """Build the stage in its LightningModule; a new run starts from the weights of `init`.

    Raises:
        ConfigurationError: the weights of `init` belong to another stage.
    """
    from unclip import bundle
    from unclip.training.acceleration import optimize
    from unclip.training.run import resolve_init

    stage = bundle.build(config["model"])
    if config["init"] is not None and new:
        weights = resolve_init(config["init"], config["stage"])
        try:
            bundle.initialize(stage, weights, embedder and embedder.fingerprint)
        except ValueError as error:
            raise ConfigurationError(f"init: {error}") from None
    optimize(stage, **config["acceleration"])
    return build(config["module"])(
        stage,
        recipe=config["model"],
        optimizer=build(config["optimizer"]),
        schedule=build(config["schedule"]),
        embedder=embedder,
        statistics_loaded=config["init"] is not None,
        name=config["stage"],
        seed=config["seed"],
    )


def build_trainer(config: dict[str, Any], metadata: dict[str, Any], checkpoint: Path | None) -> Any:
    """Build the trainer with its callbacks and loggers.

    Args:
        config: resolved configuration.
        metadata: description of the run; the number of ranks is added.
        checkpoint: checkpoint that the run resumes from; None for a new run.

    Raises:
        ResumeError: the checkpoint belongs to another run.
    """
    from unclip.provenance import code_version
    from unclip.training.callbacks.checkpoint import RunMetadata
    from unclip.training.resume import check_same_run

    trainer = build(config["trainer"])(
        callbacks=[build(callback) for callback in config["callbacks"].values()],
        loggers=[build(logger) for logger in config["logger"].values()],
    )
    metadata = {**metadata, "ranks": trainer.world_size}
    trainer.callbacks.insert(0, RunMetadata(metadata))
    if checkpoint is not None:
        strict = config["resume_strict"]
        check_same_run(checkpoint, metadata, max_steps=trainer.max_steps, strict=strict)
    for logger in trainer.loggers:
        logger.log_hyperparams({**config, "code": code_version()})
    return trainer


register_run_folder()
if __name__ == "__main__":
    check_command_line("train")
    main()
