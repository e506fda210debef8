"""Says what is wrong with a command line before anything heavy is loaded or built.

Hydra tells of an unknown key and advises to add it; here the nearest key that exists is named. Keys
and types of what will be built are compared with the signatures of what builds it.
"""

import ast
import difflib
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

SOURCE = Path(__file__).parent
CONF = SOURCE.parent / "conf"
SECRET = re.compile(r"oc\.env:\s*['\"]?\w*(KEY|TOKEN|SECRET|PASSWORD)\w*['\"]?", re.IGNORECASE)
BUILDING = re.compile("_[a-z]+_")  # keys that say how something is built


class ConfigurationError(ValueError):
    """A configuration that cannot work; its text says what to change."""


def check_command_line(config_name: str, arguments: Sequence[str] | None = None) -> None:
    """Ends the program with the nearest valid name where a command line names what is not there.

    Args:
        config_name: of conf/'s file.
        arguments: the command line; the program's own when None.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if any(word in ("--help", "-h", "--hydra-help", "--version") for word in words):
        return
    if any(word.startswith(("--config-", "-cd", "-cn", "-cp")) for word in words):
        return  # another configuration than this one's
    try:
        compose_strictly(
            config_name,
            [w for w in words if not w.startswith("-") and ("=" in w or w.startswith("~"))],
        )
    except ConfigurationError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def compose_strictly(config_name: str, words: Sequence[str]) -> DictConfig:
    """The configuration of a command line; of a sweep, that of its first job.

    Raises:
        ConfigurationError: naming the word that is wrong, and what was probably meant.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            overrides = OverridesParser.create().parse_overrides(list(words))
        except HydraException as error:
            raise ConfigurationError(str(error).splitlines()[0]) from None
        chosen = [_first_of(override) for override in overrides]
        try:
            cfg = compose(config_name, chosen, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise _explained(config_name, overrides, chosen, error) from None
        _check_kinds(config_name, cfg, overrides, chosen)
    _check_added(cfg, overrides)
    for text in _texts(OmegaConf.to_container(cfg, resolve=False)):
        if found := SECRET.search(text):
            raise ConfigurationError(
                f"${{{found[0]}}}: a secret is not put into the configuration, which is saved and "
                "logged; what needs it reads it from the environment by itself"
            )
    return cfg


def _check_kinds(
    config_name: str, cfg: DictConfig, overrides: Sequence[Override], chosen: Sequence[str]
) -> None:
    """Refuses text where the configuration has a number or a truth value, but for auto.

    `check_targets` knows more, but has to import what is built.
    """
    groups = _groups()
    texts = {
        override.key_or_group: word
        for override, word in zip(overrides, chosen, strict=True)
        if override.key_or_group not in groups
        and not override.is_add()
        and isinstance(value := _selected(cfg, override.key_or_group), str)
        and value != "auto"
    }
    if not texts:
        return
    others = [word for word in chosen if word not in texts.values()]
    try:
        usual = compose(config_name, others, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException):  # a choice, without which the rest is nothing
        return
    for key, word in texts.items():
        value = _selected(usual, key)
        if isinstance(value, bool | int | float):
            wanted = "true or false" if isinstance(value, bool) else f"number, such as {value}"
            raise ConfigurationError(f"{word} is no {wanted}")


def _check_added(cfg: DictConfig, overrides: Sequence[Override]) -> None:
    """Refuses a key that was added with + where nothing takes it, as far as sources tell."""
    for override in overrides:
        key = override.key_or_group
        if not override.is_add() or override.package is not None or key in _groups():
            continue
        parent, _, name = key.rpartition(".")
        if not parent:
            plain = OmegaConf.to_container(cfg, resolve=False)
            if not any(f"${{{key}" in text for text in _texts(plain)):
                known = [one for one in _keys(cfg) if one.partition(".")[0] != key]
                raise ConfigurationError(f"there is no {key}{_nearest(key, known)}")
            continue
        target = _selected(cfg, f"{parent}._target_") or ""
        names = _arguments(*target.rpartition(".")[::2])
        if names is not None and name not in names and not BUILDING.fullmatch(name):
            raise ConfigurationError(_not_taken(key, target, names))


def _arguments(module: str, name: str) -> list[str] | None:
    """What the source of a function or class of unclip's takes; None where that is unclear."""
    path = SOURCE / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not module.startswith("unclip") or not path.is_file():
        return None
    for part in ast.parse(path.read_text()).body:
        if isinstance(part, ast.ImportFrom) and name in [alias.name for alias in part.names]:
            return _arguments(part.module or "", name)
        if isinstance(part, ast.ClassDef | ast.FunctionDef) and part.name == name:
            methods = part.body if isinstance(part, ast.ClassDef) else []
            made_by = [one for one in methods if getattr(one, "name", "") == "__init__"]
            function = part if isinstance(part, ast.FunctionDef) else next(iter(made_by), None)
            if function is None or function.args.kwarg is not None:
                return None
            return [one.arg for one in (*function.args.args, *function.args.kwonlyargs)]
    return None


def _not_taken(key: str, target: str, names: Sequence[str]) -> str:
    name = key.rpartition(".")[2]
    return f"{key}: {target.rpartition('.')[2]} takes no {name}{_nearest(name, names)}"


def _first_of(override: Override) -> str:
    """An override as a job of a sweep has it."""
    if override.is_sweep_override():
        if not override.is_discrete_sweep():
            return f"{override.get_key_element()}={override.value().start}"
        return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"
    return override.input_line


def _explained(
    config_name: str, overrides: Sequence[Override], chosen: Sequence[str], error: Exception
) -> ConfigurationError:
    """What is wrong with the first override without which more of the rest can be composed."""
    groups = _groups()
    for override, word in zip(overrides, chosen, strict=True):
        key, value = override.key_or_group, str(override.value())
        if key in groups and not (CONF / key / f"{value}.yaml").is_file():
            options = sorted(path.stem for path in (CONF / key).glob("*.yaml"))
            if value != "None":
                return ConfigurationError(
                    f"{key}={value}: there is no such {key.rpartition('/')[2]}"
                    f"{_nearest(value, options)} (there are {', '.join(options)})"
                )
        others = [
            one for one in chosen if one != word and "=" in one and one.split("=")[0] in groups
        ]
        if key in groups or override.is_add() or override.is_force_add():
            continue
        try:
            known = _keys(compose(config_name, others, return_hydra_config=True))
        except (HydraException, OmegaConfBaseException):
            continue
        if key not in known:
            return ConfigurationError(f"there is no {key}{_nearest(key, known)}")
    return ConfigurationError(str(error).strip())


def _selected(cfg: DictConfig, key: str) -> Any:
    return OmegaConf.select(cfg, key, throw_on_resolution_failure=False)


def _groups() -> set[str]:
    return {path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir()}


def _keys(cfg: DictConfig) -> list[str]:
    found: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            found.append(f"{prefix}{key}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(cfg, resolve=False), "")
    return found


def _nearest(word: str, options: Sequence[str]) -> str:
    """The nearest of the options as a question, or nothing where nothing is near."""
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if not near:  # the right key in a wrong place
        last = word.rpartition(".")[2]
        near = [option for option in options if option.rpartition(".")[2] == last][:1]
    return f"; did you mean {near[0]}?" if near else ""


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _texts(child)


def check_targets(config: Any, key: str = "") -> None:
    """Compares every part of a configuration that will be built with what builds it.

    Raises:
        ConfigurationError: for an argument that the target does not take, or of a wrong type.
    """
    if isinstance(config, list):
        for number, part in enumerate(config):
            check_targets(part, f"{key}[{number}]")
    if not isinstance(config, dict):
        return
    if "_target_" in config:
        _check_target(config, key)
    for name, part in config.items():
        check_targets(part, f"{key}.{name}" if key else str(name))


def _check_target(config: Mapping[str, Any], key: str) -> None:
    parameters, hints = _signature(config["_target_"])
    given = {name: value for name, value in config.items() if not BUILDING.fullmatch(name)}
    for name, value in given.items():
        where = f"{key}.{name}" if key else name
        if parameters is not None and name not in parameters:
            raise ConfigurationError(_not_taken(where, config["_target_"], list(parameters)))
        if name in hints and not _fits(value, hints[name]):
            wanted = _words(hints[name])
            raise ConfigurationError(f"{where}={value!r} is no {wanted}")


@lru_cache
def _signature(target: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """(parameters by name, or None where any will do; their annotations) of a target."""
    try:
        built: Callable[..., Any] = get_object(target)
    except Exception as error:  # a package that is missing, a name that does not exist
        raise ConfigurationError(f"_target_ {target}: {error}") from None
    function = built.__init__ if inspect.isclass(built) else built
    parameters = dict(inspect.signature(built).parameters)
    kinds = {parameter.kind for parameter in parameters.values()}
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError):  # annotations of shapes
        hints = {}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return _parameters_behind(built, parameters), hints
    return parameters, hints


def _parameters_behind(built: Any, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """The names that a target takes together with what it hands the rest on to."""
    from lightning.pytorch import Trainer

    from unclip.training.trainer import build_trainer

    if built is build_trainer:
        return parameters | dict(inspect.signature(Trainer).parameters)
    if inspect.isclass(built):
        inherited = [inspect.signature(base).parameters for base in built.__mro__[1:-1]]
        return {name: value for known in (*inherited, parameters) for name, value in known.items()}
    return None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can be what an annotation says; what is not plain is let through."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (str, Path):
        return isinstance(value, str)
    if origin in (list, tuple, Sequence) or origin is types.GenericAlias:
        return isinstance(value, list)
    return True


def _words(hint: Any) -> str:
    """An annotation as people say it."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_words(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    names = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}
    return names.get(hint, "null" if hint is type(None) else getattr(hint, "__name__", str(hint)))
