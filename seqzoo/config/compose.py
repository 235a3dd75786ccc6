"""From words on a command line to one resolved, checked configuration. Starts no jax."""

import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from seqzoo.config import paths, schema
from seqzoo.config.build import build
from seqzoo.errors import ConfigError, suggest

__all__ = ["build", "compose", "expand", "parse"]

DEFAULT_EXPERIMENT = "mqar"

# Words that may be typed for keys that stand elsewhere.
ALIASES = {"eval.stream_chunk": "trainer.eval_chunk_length"}

# Shells do not expand the ~ of data.path=~/books, and Hydra's grammar takes none there.
_HOME = re.compile(r"~/[\w./+@%-]*")
# What OmegaConf says of ${data.input_dim} where the data has none.
_MISSING = re.compile(r"Interpolation key '([^']+)' not found")


def compose(
    overrides: Sequence[str] = (),
    *,
    config_name: str = "train",
    config_dir: str | None = None,
) -> DictConfig:
    """Composes, resolves and checks a configuration.

    Names in `model.pattern` that the model does not list get their mixer from configs/mixer/.
    Without experiment=, data= or task= the experiment is mqar.

    Args:
        overrides: words of the command line, ``optimizer.lr=1e-3`` or ``model=mamba_small``.
        config_name: the root file.
        config_dir: a user's own folder of groups, searched beside ours.

    Returns:
        The configuration without interpolations; numbers in the type their key asks for.

    Raises:
        ConfigError: anything is wrong with it; the text names the key and the nearest valid one.
    """
    where = paths.folders(config_dir)
    typed = parse(overrides)
    for override in typed:
        _refuse_elsewhere(override)
    words = _with_default_experiment([_checked(override, where) for override in typed])
    config = _compose(config_name, words, where)
    missing = _mixers_to_add(config, where)
    if missing:
        config = _compose(config_name, [*missing, *words], where)
    plain = _resolved(config)
    _keep_used_mixers(plain, [override.key_or_group for override in typed])
    checked = schema.check(plain)
    _check_sizes(checked)
    return OmegaConf.create(checked)


def compose_settings(
    config_name: str,
    overrides: Sequence[str],
    settings: Mapping[str, str],
    *,
    config_dir: str | None = None,
) -> dict[str, Any]:
    """Composes a root that holds sections of settings alone, such as configs/sweep.yaml.

    Args:
        config_name: the root file.
        overrides: words of the command line.
        settings: section -> the dataclass that it fills.
        config_dir: a user's own folder of groups.

    Raises:
        ConfigError: as `compose`.
    """
    where = paths.folders(config_dir)
    words = [_checked(override, where) for override in parse(overrides)]
    return schema.check_settings(_resolved(_compose(config_name, words, where)), settings)


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Returns the override lists of a sweep: every combination of ``lr=1e-3,1e-2 seed=1,2``."""
    choices = []
    for override in parse(overrides):
        key = override.get_key_element()
        if override.is_sweep_override():
            choices.append([spelled_out(key, value) for value in override.sweep_string_iterator()])
        elif override.key_or_group == "mixer" and not override.is_delete():
            choices.append([spelled_out(key, override.get_value_element_as_str())])
        else:
            choices.append([override.input_line])
    return [list(words) for words in itertools.product(*choices)]


def spelled_out(key: str, value: str) -> str:
    """One word of one run of several: ``mixer=mamba`` is short for ``model.pattern=[mamba]``."""
    return f"model.pattern=[{value}]" if key.lstrip("+") == "mixer" else f"{key}={value}"


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parses words by Hydra's grammar, with an answer to each that is none."""
    parser = OverridesParser.create()
    parsed = []
    for word in overrides:
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(f"'{word}' is no key=value; as in optimizer.lr=1e-3")
        key, equals, value = word.partition("=")
        if equals and not key.strip("+~ "):
            raise ConfigError(f"'{word}' has no key before its =; as in optimizer.lr=1e-3")
        word = f"{ALIASES.get(key, key)}{equals}{with_home(value)}"
        try:
            parsed += parser.parse_overrides([word])
        except HydraException as error:
            raise ConfigError(
                f"'{word}' cannot be read: {_first_line(error)}; quote what holds spaces, "
                "commas or brackets, as in \"model.pattern='[mamba,attention]'\""
            ) from error
    return parsed


def with_home(value: str) -> str:
    """A value that is a path below ~, quoted and with the home folder in its place; else itself."""
    if not _HOME.fullmatch(value):
        return value
    return "'" + os.path.expanduser(value).replace("'", "\\'") + "'"


def _refuse_elsewhere(override: Override) -> None:
    """Answers words that mean something, but not as a section of a run."""
    if override.package is not None or override.is_delete() or override.is_sweep_override():
        return
    word, value = override.input_line, override.get_value_element_as_str()
    group = override.key_or_group.partition(".")[0]
    if override.key_or_group == "mixer":
        raise ConfigError(f"{word}: a model has a pattern of mixers; write model.pattern=[{value}]")
    if override.key_or_group == "channel_mixer":
        raise ConfigError(f"{word}: it is part of the model; write model.channel_mixer={value}")
    if group == "launcher":
        raise ConfigError(f"{word}: one run has no launcher; it needs -m, or 'seqzoo sweep'")
    if group == "sweep":
        raise ConfigError(f"{word}: it belongs to 'seqzoo sweep'")


def _checked(override: Override, where: list[pathlib.Path]) -> str:
    """Returns a word for Hydra: group choices as they are, values with `++` (the schema judges)."""
    key, word = override.key_or_group, override.input_line
    if key.startswith("hydra"):
        raise ConfigError(f"{key}: hydra's own settings are off here; seqzoo keeps its run folders")
    if override.is_sweep_override():
        raise ConfigError(
            f"'{word}' names several values; -m runs each of them, [..] makes it one list"
        )
    if paths.is_group(key, where):
        value = override.value()
        allowed = paths.options(key, where)
        if override.is_delete() or (key == "experiment" and value is None):
            return word
        if not isinstance(value, str) or value not in allowed:
            raise ConfigError(
                f"{key}={value}: configs/{key}/ has no such file{suggest(str(value), allowed)}; "
                f"there are {', '.join(allowed)}"
            )
        return word
    section, _, group = key.rpartition(".")
    if paths.is_group(group, where):
        value, allowed = override.value(), paths.options(group, where)
        if value in allowed:
            return f"{group}@{word}"  # model.channel_mixer=swiglu: configs/channel_mixer/swiglu
        if isinstance(value, str) and (section, group) == ("model", "channel_mixer"):
            raise ConfigError(
                f"{key}={value}: configs/{group}/ has no such file{suggest(value, allowed)}; "
                f"there are {', '.join(allowed)}, or null"
            )
    plain = not (override.is_add() or override.is_force_add() or override.is_delete())
    return f"++{word}" if plain else word


def _with_default_experiment(words: list[str]) -> list[str]:
    chosen = {word.lstrip("+~").partition("=")[0].partition("@")[0] for word in words}
    words = [word for word in words if word not in ("experiment=null", "experiment=")]
    if not chosen & {"experiment", "data", "task"}:
        words = [f"experiment={DEFAULT_EXPERIMENT}", *words]
    return words


def _compose(config_name: str, words: list[str], where: list[pathlib.Path]) -> DictConfig:
    ours, *theirs = where
    if theirs:
        searched = ",".join(f"'file://{folder}'" for folder in theirs)
        words = [f"hydra.searchpath=[{searched}]", *words]
    try:
        with initialize_config_dir(str(ours), version_base=None):
            return hydra_compose(config_name, list(words))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_first_line(error)) from error


def _mixers_to_add(config: DictConfig, where: list[pathlib.Path]) -> list[str]:
    """``+mixer@model.mixers.NAME=NAME`` for each name of the pattern that has no node yet."""
    model = config.get("model")
    if not isinstance(model, DictConfig):
        return []
    pattern = OmegaConf.to_container(model).get("pattern")
    nodes = OmegaConf.to_container(model).get("mixers") or {}
    if not isinstance(pattern, list) or not isinstance(nodes, Mapping):
        return []
    for name in pattern:
        if not isinstance(name, str):
            raise ConfigError(
                f"model.pattern={_list(pattern)}: {_list(name) if isinstance(name, list) else name}"
                " is no name of a mixer; write one list of names, as in "
                "model.pattern=[mamba,attention]"
            )
    allowed = paths.options("mixer", where)
    added = []
    for name in dict.fromkeys(pattern):
        if "_target_" in (nodes.get(name) or {}):
            continue
        if name not in allowed:
            raise ConfigError(
                f"model.pattern={_list(pattern)}: there is no mixer '{name}'"
                f"{suggest(str(name), [*allowed, *nodes])}; there are "
                f"{', '.join(dict.fromkeys([*allowed, *nodes]))}"
            )
        added.append(f"+mixer@model.mixers.{name}={name}")
    return added


def _keep_used_mixers(config: dict[str, Any], typed: Sequence[str]) -> None:
    """Leaves out mixers that the pattern does not use: they are no part of the run."""
    model = config.get("model") or {}
    pattern = model.get("pattern")
    if pattern is None:
        return
    if not isinstance(pattern, list) or not pattern:
        raise ConfigError(
            f"model.pattern={pattern} must be a list of mixers, as in model.pattern=[mamba]"
        )
    for key in typed:
        first, second, name = (key.split(".") + ["", "", ""])[:3]
        if (first, second) == ("model", "mixers") and name and name not in pattern:
            near = suggest(name, pattern).replace("'?", f"{key.partition(name)[2]}'?")
            near = near.replace("mean '", "mean 'model.mixers.")
            raise ConfigError(f"{key}: model.pattern={_list(pattern)} has no '{name}'{near}")
    if isinstance(model.get("mixers"), Mapping):
        model["mixers"] = {name: node for name, node in model["mixers"].items() if name in pattern}


def _check_sizes(config: dict[str, Any]) -> None:
    for name, model, data, what in sizes_that_differ(config):
        raise ConfigError(
            f"model.{name}={model} is smaller than data.{name}={data}: {what}; set model.{name} to "
            "at least that"
        )


def sizes_that_differ(config: Mapping[str, Any]) -> Iterator[tuple[str, int, int, str]]:
    """Yields (key, model's, data's, what follows) of sizes of data that the model does not have."""
    lost = {
        "vocab_size": "tokens would have no embedding",
        "n_classes": "labels would have no logit",
    }
    for name, what in lost.items():
        model, data = config["model"].get(name), config["data"].get(name)
        if isinstance(data, int) and isinstance(model, int) and model < data:
            yield name, model, data, what


def _resolved(config: DictConfig) -> dict[str, Any]:
    for key in _without_value(OmegaConf.to_container(config), ""):
        raise ConfigError(f"{key} has no value; set it with {key}=...")
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error


def _without_value(node: Any, key: str) -> Iterator[str]:
    if node == "???":
        yield key
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _without_value(value, f"{key}.{name}" if key else str(name))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key")), "")
    if lines and (missing := _MISSING.fullmatch(lines[0])):
        group = missing[1].partition(".")[0]
        return (
            f"{key} is taken from {missing[1]}, and there is no such key here; choose {group}=... "
            f"that has one, or set {key}=..."
        )
    return (f"{key}: " if key else "") + (lines[0] if lines else type(error).__name__)


def _list(items: Sequence[Any]) -> str:
    return "[" + ",".join(str(item) for item in items) + "]"
