"""Trains a stage: `python src/train.py stage=decoder`; conf/train.yaml has the other choices."""

import unclip  # isort: skip # noqa: F401 (first: torchvision then imports beside a CPU torch)

import json
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from configuration import ConfigurationError, check_command_line, check_targets
from runs import identity, register_run_folder
from unclip.training.decay import Decay, keep_stable, resumed_decay
from unclip.training.preparation import (
    ensure_data,
    ensure_upstream,
    starting_weights,
    take_over,
)
from unclip.training.resuming import (
    AUTO,
    FINISHED,
    CheckpointError,
    ResumeError,
    check_same_run,
    checkpoint_of,
    claimed,
    is_first_rank,
)

BUILDABLE = ("unclip.", "lightning.", "torch.optim.")


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Trains the stage that the command line names and returns its validation metric."""
    hydra_config = HydraConfig.get()
    cfg.run_folder = hydra_config.runtime.output_dir
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    try:
        check(config)
        prepare(config, hydra_config.overrides.task)
        with claimed(Path(cfg.run_folder), anew=cfg.resume is None):
            return train(config, identity(cfg))
    except (ConfigurationError, OSError) as error:
        raise SystemExit(f"train.py: {error}") from None  # their text says what to do
    except (ResumeError, CheckpointError) as error:
        raise SystemExit(f"train.py: {error}") from None  # their text says what to do


def check(config: dict[str, Any]) -> None:
    """Refuses, in seconds, what cannot work: keys, types, sizes that do not fit, a full disk.

    Raises:
        ConfigurationError: naming what to change.
        FileNotFoundError: a folder has no shards, and no command is known that makes them.
    """
    from unclip import bundle
    from unclip.training import preflight, sharding

    check_targets(config)
    try:
        with torch.device("meta"):
            stage = bundle.build(config["model"])
        data = build(config["data"])()
        folders = config["folders"]
        places = [folders["runs"], folders["models"]]
        preflight.check_disk(stage, places, config["run_folder"])
        image_size, models = config["data"].get("image_size", 64), Path(folders["models"])
        name, recipe = config["stage"], config["model"]
        preflight.check_chain(name, recipe, image_size, models / config["bundle"])
        if config["trainer"]["strategy"] == "fsdp":
            sharding.blocks_of(stage)
        if config["init"] is not None:
            bundle.check_init(stage, starting_weights(config["init"], name))
        if config["prepare"]["build"] is None:
            preflight.check_shards(data)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None


def prepare(config: dict[str, Any], overrides: list[str]) -> None:
    """Makes sure, before anything heavy, that what the run needs is there."""
    if config["resume"] not in (None, AUTO) and not Path(config["resume"]).is_file():
        raise FileNotFoundError(f"resume={config['resume']}: there is no such file")
    bundle = Path(config["folders"]["models"]) / config["bundle"]
    needs = config["embedder"]["needs"] if config["needs_clip"] else []
    if config["init"] is not None:
        take_over(needs, starting_weights(config["init"], config["stage"]).parent, bundle)
    ensure_upstream(needs, bundle, overrides, train=config["upstream"] == "train")
    ensure_data(build(config["prepare"]["build"]), config["prepare"]["done"])


def train(config: dict[str, Any], settings: dict[str, Any]) -> float | None:
    """Builds what the configuration says and fits it.

    Args:
        config: all of it.
        settings: what of it makes this run another than others.
    """
    set_up_process(config["seed"])
    from unclip.training.embeddings import check_sizes, ensure_embeddings

    embedder = build(config["embedder"]["build"]) if config["needs_clip"] else None
    if embedder is not None:
        check_sizes(embedder, config["clip"])
    folder = Path(config["run_folder"])
    checkpoint, decay = resumed_decay(
        checkpoint_of(folder, config["resume"]),
        config["schedule"].get("decay_steps", 0),
        folder=folder,
        anyway=config["resume_anyway"],
    )
    module = build_module(config, embedder, fresh=checkpoint is None)
    stored = embedder is not None and config["stored_embeddings"]
    features = {"embeddings": embedder.fingerprint} if stored else {"load_image": True}
    data = build(config["data"])(**features)
    fingerprints = {"data_set": data.fingerprint(), "clip": embedder and embedder.fingerprint}
    record = {"config": settings, **fingerprints, "decay": decay._asdict()}
    trainer = build_trainer(config, record, checkpoint, decay)
    if stored:
        ensure_embeddings(embedder, data, trainer.strategy.root_device)
    if trainer.is_global_zero:
        OmegaConf.save(config, folder / "config.yaml")
        if decay.start is not None:
            keep_stable(checkpoint, decay, folder)
    trainer.fit(module, data, ckpt_path=checkpoint)
    measured = trainer.callback_metrics.get(config["objective"])
    objective = None if measured is None else float(measured)
    if trainer.is_global_zero:  # where a sweep finds it
        result = {"name": config["objective"], "value": objective}
        (folder / FINISHED).write_text(json.dumps(result) + "\n")
    return objective


def set_up_process(seed: int) -> None:
    """What holds for the whole process, before anything is built."""
    from unclip.training.trainer import end_with_parent, keep_freed_memory, quieten

    quieten()
    keep_freed_memory()
    if not is_first_rank():
        end_with_parent()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(seed)  # the same first weights on all ranks


def build_module(config: dict[str, Any], embedder: Any, *, fresh: bool) -> Any:
    """The stage in its LightningModule; a fresh one starts from the weights of `init`.

    Raises:
        ConfigurationError: these are of another stage.
    """
    from unclip import bundle
    from unclip.training.acceleration import accelerate

    stage = bundle.build(config["model"])
    if config["init"] is not None and fresh:
        start = starting_weights(config["init"], config["stage"])
        try:
            bundle.initialize(stage, start, embedder and embedder.fingerprint)
        except ValueError as error:
            raise ConfigurationError(f"init: {error}") from None
    accelerate(stage, **config["acceleration"])
    return build(config["module"])(
        stage,
        recipe=config["model"],
        optimizer=build(config["optimizer"]),
        schedule=build(config["schedule"]),
        embedder=embedder,
        fitted=config["init"] is not None,
        name=config["stage"],
        seed=config["seed"],
    )


def build_trainer(
    config: dict[str, Any], record: dict[str, Any], checkpoint: Path | None, decay: Decay
) -> Any:
    """The trainer, its loggers told of the run.

    Args:
        config: all of it.
        record: what the run is of, to which the number of ranks is added.
        checkpoint: where it goes on from.
        decay: decay of the learning rate, at whose end the run ends.

    Raises:
        ResumeError: that is of another run.
    """
    from unclip.provenance import code_version
    from unclip.training.callbacks.record import RunRecord

    trainer = build(decay.trainer_settings(config["trainer"]))(
        callbacks=[build(callback) for callback in config["callbacks"].values()],
        loggers=[build(logger) for logger in config["logger"].values()],
    )
    record = {**record, "ranks": trainer.world_size}
    trainer.callbacks.insert(0, RunRecord(record))
    if checkpoint is not None:
        steps, anyway = trainer.max_steps, config["resume_anyway"]
        check_same_run(checkpoint, record, max_steps=steps, anyway=anyway)
    for logger in trainer.loggers:
        logger.log_hyperparams({**config, "code": code_version()})
    return trainer


def build(config: Any) -> Any:
    """Instantiates a part of the configuration, but only what a run is made of."""
    pending = [config]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            target = part.get("_target_")
            if target is not None and not target.startswith(BUILDABLE):
                raise ValueError(f"_target_ {target} is none of {', '.join(BUILDABLE)}…")
            pending += part.values()
        elif isinstance(part, list):
            pending += part
    return instantiate(config, _convert_="all")


register_run_folder()
if __name__ == "__main__":
    check_command_line("train")
    main()
