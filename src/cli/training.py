"""Parts of train.py and embed.py: name a run, check it, provide its inputs, build its objects.

torch and Lightning are imported inside functions, so that `train.py --help` starts quickly.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from cli import refuse_shipped
from cli.config_check import ConfigurationError, check_targets

# Keys that may change when a run resumes.
RESUMABLE_KEYS = ("run_folder", "resume", "resume_strict", "upstream", "logger", "profile")


def config_identity(cfg: DictConfig) -> dict[str, Any]:
    """Return the part of a configuration that distinguishes its run from others."""
    fixed = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    fixed.run_folder = ""
    config = OmegaConf.to_container(fixed, resolve=True)
    config["schedule"].pop("decay_steps", None)  # a decay starts when a run resumes
    return {key: value for key, value in config.items() if key not in RESUMABLE_KEYS}


def _run_folder(*, _root_: DictConfig) -> str:
    from unclip.training.resume import AUTO, choose_run_dir

    if _root_.resume not in (None, AUTO):
        return str(Path(_root_.resume).absolute().parent)
    parent = Path(_root_.folders.runs) / _root_.bundle / _root_.stage
    try:
        return str(choose_run_dir(parent, config_identity(_root_)))
    except OmegaConfBaseException:  # a value is missing; the error is raised when it is used
        return str(parent / "incomplete")


OmegaConf.register_new_resolver("run_folder_of", _run_folder, replace=True)  # for conf/train.yaml


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Exit with one line instead of a traceback if the message says how to fix the error."""
    from unclip.launcher import LaunchError
    from unclip.training.resume import ResumeError

    program = Path(sys.argv[0]).name
    try:
        yield
    except MissingMandatoryValue as error:
        key = error.full_key
        raise SystemExit(f"{program}: {key} has no value: add {key}=VALUE") from None
    except (ConfigurationError, LaunchError, ResumeError, OSError) as error:
        raise SystemExit(f"{program}: {error}") from None


def build(config: Any) -> Any:
    """Instantiate a part of a configuration that `check_targets` has accepted."""
    try:
        return instantiate(config, _convert_="all")
    except InstantiationException as error:  # its cause has the message for the user
        cause = error.__cause__ or error
        raise (ConfigurationError(str(cause)) if isinstance(cause, ValueError) else cause) from None


def check(config: dict[str, Any]) -> None:
    """Refuse within seconds a run that cannot work: wrong keys, types and sizes, a full disk.

    Raises:
        ConfigurationError: the message says what to change.
        FileNotFoundError: a folder has no shards, and no command is known that makes them.
        LaunchError: a launcher started another number of processes.
    """
    from unclip.launcher import settle_rank

    settle_rank(config["trainer"]["devices"], config["trainer"].get("num_nodes", 1))
    check_targets(config)
    import torch

    from unclip import bundle
    from unclip.data.shards import list_shards
    from unclip.training import run, sharding
    from unclip.training.trainer import resolve_precision, total_steps

    name, recipe, folders = config["stage"], config["model"], config["folders"]
    trainer = config["trainer"]
    try:
        refuse_shipped(Path(folders["models"]) / config["bundle"], "add bundle=NAME")
        resolve_precision(trainer["precision"], trainer["accelerator"])
        total_steps(trainer["max_steps"], trainer["max_steps_multiplier"])
        with torch.device("meta"):
            stage = bundle.build(recipe)
        data = build(config["data"])()
        run.check_disk(stage, [folders["runs"], folders["models"]], config["run_folder"])
        image_size = config["data"].get("image_size", 64)
        run.check_chain(name, recipe, image_size, Path(folders["models"]) / config["bundle"])
        if trainer["strategy"] == "fsdp":
            sharding.blocks_of(stage)
        if config["init"] is not None:
            bundle.check_init(stage, run.resolve_init(config["init"], name))
        if config["prepare"]["build"] is None:
            for source in data.sources():
                list_shards(source)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None


def ensure_inputs(config: dict[str, Any], overrides: list[str]) -> None:
    """Provide the checkpoint, the upstream stages and the data, or say how to make them.

    Args:
        config: resolved configuration.
        overrides: command line, from which an upstream run inherits.
    """
    from unclip.training import run
    from unclip.training.resume import AUTO

    resume, init, prepare = config["resume"], config["init"], config["prepare"]
    if resume not in (None, AUTO) and not Path(resume).is_file():
        raise FileNotFoundError(f"resume={resume}: there is no such file")
    bundle = Path(config["folders"]["models"]) / config["bundle"]
    needs = config["embedder"]["needs"] if config["needs_clip"] else []
    if init is not None:
        run.copy_upstream(needs, run.resolve_init(init, config["stage"]).parent, bundle)
    run.ensure_upstream(needs, bundle, overrides, train=config["upstream"] == "train")
    if prepare["build"] is not None:
        run.ensure_data(build(prepare["build"]), prepare["done"])


def set_up_process(seed: int) -> None:
    """Configure logging, memory and random numbers of this process."""
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from unclip.device import set_up_device
    from unclip.evaluation.distributed import die_with_parent
    from unclip.launcher import is_first_rank
    from unclip.training.trainer import silence_lightning, tune_malloc

    silence_lightning()
    if not torch.cuda.is_available():
        tune_malloc()
    if is_first_rank():
        rank_zero_only.rank = 0  # until the strategy sets it; Lightning has read a stale RANK
    if os.environ.get("LOCAL_RANK", "0") != "0":  # the parent is rank 0 of the node, or torchrun
        die_with_parent()
    set_up_device(training=True)
    torch.manual_seed(seed)  # the same initial weights on all ranks


def build_embedder(config: dict[str, Any]) -> Any:
    """Build the CLIP embedder, or return None for a stage that needs none."""
    from unclip.device import device_of, resolve_dtype

    if not config["needs_clip"]:
        return None
    embedder = build(config["embedder"]["build"])
    device = device_of(config["trainer"]["accelerator"])
    embedder.to("cpu", resolve_dtype(config["embedder"]["dtype"], device))
    for name in ("embedding_dim", "text_width", "context_length"):
        actual, expected = getattr(embedder, name), config["clip"][name]
        if actual != expected:
            raise ConfigurationError(
                f"the CLIP {embedder.fingerprint} has {name} {actual}, but this stage is "
                f"configured for {expected}: add clip.{name}={actual}, or use another CLIP"
            )
    return embedder


def build_module(config: dict[str, Any], embedder: Any, *, new: bool) -> Any:
    """Build the stage in its LightningModule; a new run starts from the weights of `init`."""
    from unclip import bundle
    from unclip.device import device_of
    from unclip.training.acceleration import optimize
    from unclip.training.run import resolve_init

    stage = bundle.build(config["model"])
    if config["init"] is not None and new:
        weights = resolve_init(config["init"], config["stage"])
        try:
            bundle.initialize(stage, weights, embedder and embedder.fingerprint)
        except ValueError as error:
            raise ConfigurationError(f"init: {error}") from None
    trainer = config["trainer"]
    sharded, device = trainer["strategy"] == "fsdp", device_of(trainer["accelerator"])
    choose_checkpointing(config, embedder)
    optimize(stage, **config["acceleration"], sharded=sharded, device=device)
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


def choose_checkpointing(config: dict[str, Any], embedder: Any) -> None:
    """Replace gradient_checkpointing=auto: on a GPU, by whether a step would not fit without."""
    import torch

    from cli import planning
    from unclip.device import device_of
    from unclip.launcher import is_first_rank

    if config["acceleration"]["gradient_checkpointing"] != "auto":
        return
    if device_of(config["trainer"]["accelerator"]) == "cpu":
        config["acceleration"]["gradient_checkpointing"] = False
        return
    memory = torch.cuda.get_device_properties(0).total_memory
    clip = 0 if embedder is None else sum(p.nbytes for p in embedder.model.parameters())
    planning.measure(config, (memory - clip) / planning.GIB)
    if config["acceleration"]["gradient_checkpointing"] and is_first_rank():
        print("gradient checkpointing is on: without it, a step needs over 90% of the GPU's memory")


def open_trainer(
    config: dict[str, Any], metadata: dict[str, Any], checkpoint: Path | None, max_steps: int | None
) -> Any:
    """Build the trainer with its callbacks and loggers, and check the run that it resumes.

    Args:
        config: resolved configuration.
        metadata: description of the run; the number of ranks is added.
        checkpoint: checkpoint that the run resumes from; None for a new run.
        max_steps: number of steps; None for that of the configuration.
    """
    from unclip.provenance import code_version
    from unclip.training.callbacks.checkpoint import RunMetadata
    from unclip.training.callbacks.progress import Profile
    from unclip.training.resume import check_same_run

    settings = config["trainer"]
    if max_steps is not None:
        settings = {**settings, "max_steps": max_steps, "max_steps_multiplier": 1.0}
    callbacks = [build(callback) for callback in config["callbacks"].values()]
    if config["profile"]:
        callbacks.append(Profile(config["profile"], config["run_folder"]))
    trainer = build(settings)(
        callbacks=callbacks,
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
