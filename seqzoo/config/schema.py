"""Every key of a composed configuration against the constructor that will receive it.

A node with `_target_` is checked against that constructor; the sections without one against the
settings that the train loop reads; the root against the table below. A typo or a wrong type ends
here, before anything runs, naming the key and the nearest valid one.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from seqzoo.config import foreign
from seqzoo.config.annotations import converted, fits, takes_mapping
from seqzoo.config.signature import Keyword, Signature, signature_of
from seqzoo.errors import ConfigError

SETTINGS = {
    "trainer": "seqzoo.train.settings.TrainerSettings",
    "mesh": "seqzoo.train.settings.MeshSettings",
    "logger": "seqzoo.train.settings.LoggerSettings",
}
# Of `seqzoo sweep` alone.
SWEEP_SETTINGS = {
    "sweep": "seqzoo.sweep.settings.SweepSettings",
    "launcher": "seqzoo.sweep.settings.LauncherSettings",
}
NODES = ("task", "data", "model", "optimizer", "schedule")
ROOT = {
    "name": Keyword(
        annotation="str | None",
        default="None",
        meaning="the folder above the run, runs/NAME/; null = what the data is called",
    ),
    "init_from": Keyword(
        annotation="str | None",
        default="None",
        meaning="RUN@STEP: start from a step (or best, last) of another run",
    ),
    "reset": Keyword(
        annotation="list[str]",
        default="[]",
        meaning="what init_from leaves behind: optimizer, schedule, data",
    ),
}
# Words of Hydra's instantiate, and what the builder gives.
_WORDS = {"_target_", "_partial_", "_convert_", "_args_", "_recursive_"}
_GIVEN = {"rngs"}


def check(config: Mapping[str, Any]) -> dict[str, Any]:
    """Checks a resolved configuration, a plain mapping, and returns it with numbers normalised.

    Raises:
        ConfigError: the first key that does not exist, is missing, or has the wrong type.
    """
    known = valid_keys(config)
    unknown = [key for key in config if key not in (*ROOT, *NODES, *SETTINGS)]
    if unknown:
        raise _no_such_key(unknown[0], known, config[unknown[0]])
    out = {}
    for key, keyword in ROOT.items():
        out[key] = _value(key, config.get(key), keyword, known)
    for section in (*NODES, *SETTINGS):
        node = config.get(section)
        if not isinstance(node, Mapping):
            raise ConfigError(f"{section} is {node!r}; choose one of configs/{section}/")
        if section in SETTINGS:
            out[section] = _node(section, node, signature_of(SETTINGS[section]), known)
        elif "_target_" not in node:
            raise ConfigError(f"{section} names no class: it lacks _target_")
        else:
            out[section] = _node(section, node, _signature(section, node), known)
    return out


def without_unknown_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration less what another version of seqzoo knew beside model, data and task.

    Sections and settings of training are left out that are not known here: they say nothing of the
    model. What is missing has its default.
    """
    kept = {key: value for key, value in config.items() if key in (*ROOT, *NODES, *SETTINGS)}
    for section, target in SETTINGS.items():
        known = signature_of(target).keywords
        node = kept.get(section) or {}
        kept[section] = {key: value for key, value in node.items() if key in known}
    return kept


def check_settings(config: Mapping[str, Any], settings: Mapping[str, str]) -> dict[str, Any]:
    """The same for a configuration of settings alone.

    Args:
        config: resolved.
        settings: section -> the dataclass that it fills.
    """
    known = [
        f"{section}.{key}"
        for section, target in settings.items()
        for key in signature_of(target).keywords
    ]
    return {
        section: _node(section, config[section], signature_of(target), known)
        for section, target in settings.items()
    }


def valid_keys(config: Mapping[str, Any]) -> list[str]:
    """Returns every key that this configuration could hold, as ``section.key``."""
    found = list(ROOT)
    for section in (*NODES, *SETTINGS):
        found.append(section)
        node = config.get(section)
        if section in SETTINGS:
            found += [f"{section}.{key}" for key in signature_of(SETTINGS[section]).keywords]
        elif isinstance(node, Mapping):
            found += _keys_below(section, node)
    return found


def _keys_below(path: str, node: Mapping[str, Any]) -> Iterable[str]:
    if isinstance(node.get("_target_"), str):
        try:
            keywords = signature_of(node["_target_"]).keywords
            yield from (f"{path}.{key}" for key in keywords if key not in _GIVEN)
        except ConfigError:
            return
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _keys_below(f"{path}.{key}", value)


def _signature(path: str, node: Mapping[str, Any]) -> Signature:
    target = node["_target_"]
    if not isinstance(target, str):
        raise ConfigError(f"{path}._target_ is {target!r}; it must be package.module.Class")
    try:
        return signature_of(target)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from error.__cause__


def _node(
    path: str, node: Mapping[str, Any], signature: Signature, known: list[str]
) -> dict[str, Any]:
    # Its own values first: children repeat some of them by interpolation, and the text should name
    # the key that was typed.
    out: dict[str, Any] = dict.fromkeys(node)
    for key, value in sorted(node.items(), key=lambda item: isinstance(item[1], Mapping)):
        if key in _WORDS:
            out[key] = value
        elif key in signature.keywords and key not in _GIVEN:
            out[key] = _value(f"{path}.{key}", value, signature.keywords[key], known)
        elif signature.open:
            out[key] = value
        else:
            raise _no_such_key(f"{path}.{key}", known, value)
    for key, keyword in signature.keywords.items():
        if keyword.required and key not in node and key not in _GIVEN and not node.get("_partial_"):
            owner = node.get("_target_", SETTINGS.get(path))
            raise ConfigError(f"{path}.{key} is missing; {owner} needs it")
    return out


def _value(path: str, value: Any, keyword: Keyword, known: list[str]) -> Any:
    if value == "???":
        raise ConfigError(f"{path} has no value; set it with {path}=...")
    if isinstance(value, Mapping):
        if "_target_" in value:
            return _node(path, value, _signature(path, value), known)
        if takes_mapping(keyword.annotation):
            return _children(path, value, known)
        raise ConfigError(
            f"{path} is set by its keys {', '.join(value)} alone, but is not chosen: it needs a "
            f"_target_ (its type is {_readable(keyword.annotation)})"
        )
    if not fits(value, keyword.annotation):
        raise ConfigError(
            f"{path}={value} is {_kind(value)}; it must be {_readable(keyword.annotation)}"
        )
    return converted(value, keyword.annotation)


def _children(path: str, value: Mapping[str, Any], known: list[str]) -> dict[str, Any]:
    built = [key for key, child in value.items() if _is_node(child)]
    out = {}
    for key, child in value.items():
        inside = f"{path}.{key}"
        if _is_node(child):
            out[key] = _node(inside, child, _signature(inside, child), known)
        elif built and isinstance(child, Mapping):
            near = difflib.get_close_matches(str(key), built, n=1, cutoff=0.0)[0]
            first = next(iter(child), "")
            raise ConfigError(
                f"{inside}.{first}: there is no {inside}; did you mean '{path}.{near}.{first}'?"
            )
        else:
            out[key] = child
    return out


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _no_such_key(key: str, known: list[str], value: Any) -> ConfigError:
    if isinstance(value, Mapping) and value and key not in known:
        key = f"{key}.{next(iter(value))}"  # say what was typed: modle.d_model, not modle
    word = key.rpartition(".")[2]
    ours = [name for name in foreign.answer(word) if name in known] or foreign.answer(word)
    if ours:
        return ConfigError(f"there is no key '{key}'; seqzoo calls it '{ours[0]}'")
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near or "." not in key:
        # A key typed without its section, or in the wrong one: compare last words.
        last: dict[str, str] = {}
        for name in known:
            last.setdefault(name.rpartition(".")[2], name)
        words = difflib.get_close_matches(word, list(last), n=1, cutoff=0.6)
        near = [last[words[0]]] if words else near
    if near:
        return ConfigError(f"there is no key '{key}'; did you mean '{near[0]}'?")
    return ConfigError(
        f"there is no key '{key}'; docs/keys.md lists all, 'seqzoo show' prints those in force"
    )


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text"
    return {bool: "a bool", int: "an int", float: "a float"}.get(type(value), "a list")


def _readable(annotation: str | None) -> str:
    text = (annotation or "anything").replace("None", "null")
    return text.removeprefix("Literal[").removesuffix("]") if text.startswith("Literal[") else text
