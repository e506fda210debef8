"""Check a command line and its configuration: unknown keys, wrong types, ranges, secrets.

Hydra answers an unknown key with the advice to add it; here the message names the nearest key.
"""

import difflib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cli.ranges import check_ranges

CONF = Path(__file__).parents[2] / "conf"
SECRET = re.compile(r"oc\.env:\s*['\"]?\w*(KEY|TOKEN|SECRET|PASSWORD)\w*['\"]?", re.IGNORECASE)
HYDRA_FLAG = re.compile(
    "--(cfg|resolve|package|run|multirun|shell-|experimental-|info)|-([cprmi]|sc)$"
)
TAKES_WORD = ("--cfg", "-c", "--package", "-p", "--info", "-i", "--experimental-rerun")
HYDRA_KEY = re.compile("_[a-z]+_")  # _target_ and the like
FORWARDS_TO = {"unclip.training.trainer.build_trainer": "lightning.pytorch.Trainer"}
BUILDABLE = ("unclip.", "lightning.", "torch.optim.")


class ConfigurationError(ValueError):
    """A configuration that cannot work; the message says what to change."""


def check_command_line(config_name: str, arguments: Sequence[str] | None = None) -> None:
    """Exit with one line if a command line of conf/CONFIG_NAME.yaml has a wrong key or value."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # --help needs no check, and with --config-dir the configuration is from elsewhere.
    if any(re.match("--help|-h$|--hydra-help|--version|--config-|-c[dnp]", word) for word in words):
        return
    try:
        cfg = compose_strictly(config_name, list(_overrides(words)))
        if config_name in ("train", "embed"):  # before Hydra makes the folder of the run
            runs = Path(cfg.folders.runs).absolute()
            existing = next(path for path in (runs, *runs.parents) if path.exists())
            if not os.access(existing, os.W_OK):
                raise ConfigurationError(
                    f"{existing} is not writable: run in another folder, or set folders.runs and "
                    "folders.models"
                )
    except ConfigurationError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def _overrides(words: Sequence[str]) -> Iterator[str]:
    """Yield the overrides of a command line; refuse words that are neither these nor Hydra's."""
    for before, word in pairwise(["", *words]):
        if word.startswith("~") or ("=" in word and not word.startswith("-")):
            yield word
        elif not HYDRA_FLAG.match(word) and before not in TAKES_WORD:
            raise ConfigurationError(f"{word}: expected KEY=VALUE, without dashes and spaces")


def compose_strictly(config_name: str, words: Sequence[str]) -> DictConfig:
    """Compose the configuration of a command line, or of the first job of a sweep.

    A wrong word raises a ConfigurationError with the nearest valid one.
    """
    groups = {path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir()}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            overrides = OverridesParser.create().parse_overrides(list(words))
            values, structure = {}, []  # structure: choices of groups, and additions of keys
            for override in overrides:
                key, word = override.key_or_group, _first_choice(override)
                if "/" in key or key in groups or override.is_add() or override.is_force_add():
                    structure.append(word)
                else:
                    values[key] = word
            usual = compose(config_name, structure, return_hydra_config=True)
            known = [key for key, _ in _nodes(OmegaConf.to_container(usual, resolve=False))]
            for key in values:
                if key not in known:
                    raise ConfigurationError(f"there is no key {key}{_nearest(key, known)}")
            cfg = compose(config_name, [*structure, *values.values()], return_hydra_config=True)
        except MissingConfigException as error:
            raise _unknown_choice(error) from None
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigurationError(str(error).strip().splitlines()[0]) from None
    _check_types(values, usual, cfg)
    _check_preset(cfg)
    for override in overrides:
        if override.is_add() and override.key_or_group not in groups:
            _check_added(override.key_or_group, cfg)
    plain = OmegaConf.to_container(cfg, resolve=False)
    try:
        check_ranges({name: part for name, part in plain.items() if name != "hydra"})
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    for text in (value for _, value in _nodes(plain) if isinstance(value, str)):
        if found := SECRET.search(text):
            raise ConfigurationError(
                f"${{{found[0]}}}: the configuration is saved and logged, so it must not contain "
                "secrets; the libraries that need one read it from the environment"
            )
    return cfg


def _first_choice(override: Override) -> str:
    """Return an override with the value that the first job of a sweep gets."""
    if not override.is_sweep_override():
        return override.input_line
    if override.is_discrete_sweep():
        return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"
    return f"{override.get_key_element()}={override.value().start}"


def _unknown_choice(error: MissingConfigException) -> ConfigurationError:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    near, choices = _nearest(choice, error.options or ()), ", ".join(error.options or ())
    return ConfigurationError(f"there is no {group}={choice}{near} (choices: {choices})")


def _check_types(values: Mapping[str, str], usual: DictConfig, cfg: DictConfig) -> None:
    """Refuse text other than "auto" for a number or truth value; no import is needed."""
    for key, word in values.items():
        before, now = (_select(config, key) for config in (usual, cfg))
        if isinstance(before, bool | int | float) and isinstance(now, str) and now != "auto":
            wanted = "true or false" if isinstance(before, bool) else f"a number such as {before}"
            raise ConfigurationError(f"{word}: expected {wanted}")


def _check_preset(cfg: DictConfig) -> None:
    """Require a preset for the chosen stage and scale, in programs that have one."""
    choices = cfg.hydra.runtime.choices
    presets = [choices[key] for key in ("preset", "preset@_global_") if key in choices]
    if presets and not any((CONF / "preset" / f"{preset}.yaml").is_file() for preset in presets):
        stage = presets[0].partition("/")[0]
        others = sorted(path.stem for path in (CONF / "preset" / stage).glob("*.yaml"))
        raise ConfigurationError(
            f"there is no preset={presets[0]}: choose another size of the stage with "
            f"preset={stage}/SIZE (sizes: {', '.join(others)})"
        )


def _check_added(key: str, cfg: DictConfig) -> None:
    """Refuse a key that was added with + if nothing uses it."""
    parent, _, name = key.rpartition(".")
    if parent:
        target = _select(cfg, f"{parent}._target_")
        if target and not HYDRA_KEY.fullmatch(name):
            _check_name(key, target)
        return
    nodes = dict(_nodes(OmegaConf.to_container(cfg, resolve=False)))
    if not any(f"${{{key}" in value for value in nodes.values() if isinstance(value, str)):
        known = [one for one in nodes if one.partition(".")[0] != key]
        raise ConfigurationError(f"there is no key {key}{_nearest(key, known)}")


def _select(cfg: DictConfig, key: str) -> Any:
    return OmegaConf.select(cfg, key, throw_on_resolution_failure=False)


def _nodes(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all keys and values of nested dicts and lists, the outer ones first."""
    items = dict(enumerate(config)) if isinstance(config, list) else config
    if isinstance(items, dict):
        yield from ((f"{prefix}{key}", value) for key, value in items.items())
        for key, value in items.items():
            yield from _nodes(value, f"{prefix}{key}.")


def _nearest(word: str, options: Sequence[str]) -> str:
    """Return a question with the nearest option, or nothing if no option is near."""
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if not near:  # the right name in a wrong place
        last = word.rpartition(".")[2]
        near = [option for option in options if option.rpartition(".")[2] == last][:1]
    return f"; did you mean {near[0]}?" if near else ""


def check_targets(config: Any, key: str = "") -> None:
    """Compare all arguments in a configuration with the signatures of their `_target_`."""
    if isinstance(config, list):
        config = {f"[{number}]": part for number, part in enumerate(config)}
    if not isinstance(config, dict):
        return
    target = config.get("_target_")
    if target is not None and not target.startswith(BUILDABLE):
        raise ConfigurationError(f"_target_ {target} is not in {', '.join(BUILDABLE)}")
    for name, value in config.items():
        where = f"{key}.{name}".lstrip(".")
        if target is not None and not HYDRA_KEY.fullmatch(name):
            _check_name(where, target)
            hint = _signature(target)[1].get(name, Any)
            if not _fits(value, hint):
                raise ConfigurationError(f"{where}={value!r}: expected {_describe(hint)}")
        check_targets(value, where)


def _check_name(key: str, target: str) -> None:
    names, name = _signature(target)[0], key.rpartition(".")[2]
    if name not in names:
        owner = target.rpartition(".")[2]
        raise ConfigurationError(f"{key}: {owner} has no argument {name}{_nearest(name, names)}")


@lru_cache
def _signature(target: str) -> tuple[list[str], dict[str, Any]]:
    """Return the names of a target's parameters, and their type hints."""
    try:
        built = get_object(target)
    except Exception as error:  # a missing package, or a name that does not exist
        raise ConfigurationError(f"_target_ {target}: {error}") from None
    parameters = inspect.signature(built).parameters
    try:
        hints = get_type_hints(built.__init__ if inspect.isclass(built) else built)
    except (NameError, TypeError):  # jaxtyping's annotations
        hints = {}
    if target in FORWARDS_TO:
        return [*parameters, *_signature(FORWARDS_TO[target])[0]], hints
    forwards = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    if inspect.isclass(built) and forwards:  # its keyword arguments go to a base class
        bases = [inspect.signature(base).parameters for base in built.__mro__[:-1]]
        return [name for names in bases for name in names], hints
    return list(parameters), hints


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a plain value has a type; types that are not plain accept everything."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list)
    if hint in (int, float) and isinstance(value, bool):
        return False
    plain = {type(None): type(None), bool: bool, int: int, float: int | float, str: str, Path: str}
    return isinstance(value, plain.get(hint, object))


def _describe(hint: Any) -> str:
    """Return the name of a type in plain English."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_describe(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    names |= {Path: "a path", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
