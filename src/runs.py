"""Names runs after their configuration: the same command has the same folder, on all ranks."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unclip.training.resuming import AUTO, folder_of

# What a run may be continued with differently.
FREE = ("hydra", "run_folder", "resume", "resume_anyway", "upstream", "logger")


def identity(cfg: DictConfig) -> dict[str, Any]:
    """What of a configuration makes its run another than others."""
    plain = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    plain.run_folder = ""
    config = OmegaConf.to_container(plain, resolve=True)
    config["schedule"].pop("decay_steps", None)  # a decay starts when a run resumes
    return {key: value for key, value in config.items() if key not in FREE}


def register_run_folder() -> None:
    """Gives conf/train.yaml the resolver run_folder_of."""
    OmegaConf.register_new_resolver("run_folder_of", _run_folder, replace=True)


def _run_folder(*, _root_: DictConfig) -> str:
    if _root_.resume not in (None, AUTO):
        return str(Path(_root_.resume).absolute().parent)
    parent = Path(_root_.folders.runs) / _root_.bundle / _root_.stage
    try:
        return str(folder_of(parent, identity(_root_)))
    except OmegaConfBaseException:  # something is missing, which is said when it is asked for
        return str(parent / "incomplete")
