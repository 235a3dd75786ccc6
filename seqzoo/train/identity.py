"""What makes a run that run: the identity, its hash, and the name of its folder.

The identity covers what decides the result and nothing else, so that a run may move to another
machine, mesh or logger and go on. Imports no jax: the command line asks before jax starts.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Sections that belong whole, less the keys named below.
_SECTIONS = ("task", "model", "data", "optimizer", "schedule")

# How it is computed, not what: these may change under a run wherever they stand in a section.
# (`remat` trades memory for time, `implementation` names the back end of an operator.)
EXECUTION_KEYS = frozenset({"implementation", "remat", "workers", "prefetch"})

# Where the data lies. The fingerprint says what it is, so with one in hand the place is dropped.
_PLACE_KEYS = frozenset({"path", "paths"})

# What of the trainer decides the result: seeds, global batch, total steps, numerics policy.
_TRAINER_KEYS = ("steps", "global_batch_size", "seed", "ema_decay", "precision", "deterministic")
# A run that may stop at its target ends when an evaluation says so: then evaluating is identity.
_STOPPING_KEYS = ("stop_at_target", "eval_every", "eval_samples")

# What metrics.jsonl holds, and from which rows; no identity otherwise, but a change is noticed.
_LOGGED_KEYS = ("eval_every", "eval_samples", "test_samples", "log_every")

_HASH_LENGTH = 10
_NAME_BYTES = 100


def plain(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Returns a resolved configuration as plain dicts, lists and scalars."""
    found: Any = config
    if isinstance(config, DictConfig):
        found = OmegaConf.to_container(config, resolve=True)
    return {str(key): value for key, value in found.items()}


def identity(
    config: DictConfig | Mapping[str, Any], data_fingerprint: str | None = None
) -> dict[str, Any]:
    """Returns the part of a configuration that decides the result of a run.

    In: task, model, data (with its fingerprint), optimizer, schedule, seeds, global batch, total
    steps, numerics policy, the trunk a run branches from. Out: mesh, launcher, logger, paths,
    host, workers, `implementation`, `remat`, intervals of saving and logging.

    Args:
      config: the resolved configuration.
      data_fingerprint: what the data source says of itself. With it the paths of the data are
        left out; without it they stay in, as all that is known of the data.

    Returns:
      Plain dicts, lists and scalars, fit for JSON.
    """
    container = plain(config)
    kept: dict[str, Any] = {}
    for section in _SECTIONS:
        dropped = EXECUTION_KEYS
        if section == "data" and data_fingerprint is not None:
            dropped |= _PLACE_KEYS
        kept[section] = _without(container.get(section), dropped)
    if data_fingerprint is not None:
        kept["data_fingerprint"] = data_fingerprint
    trainer = container.get("trainer") or {}
    names = _TRAINER_KEYS + (_STOPPING_KEYS if trainer.get("stop_at_target") else ())
    kept["trainer"] = {name: _canonical(trainer[name]) for name in names if name in trainer}
    if container.get("init_from"):
        kept["init_from"] = str(container["init_from"]).rstrip("/").rsplit("/", 1)[-1]
        kept["reset"] = sorted(container.get("reset") or [])
    return kept


def logged(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings whose change under a run changes what the lines of its log mean."""
    trainer = plain(config).get("trainer") or {}
    return {f"trainer.{name}": trainer[name] for name in _LOGGED_KEYS if name in trainer}


def run_hash(config: DictConfig | Mapping[str, Any], data_fingerprint: str | None = None) -> str:
    """Returns the short hash by which the folder of a run is found again."""
    text = json.dumps(identity(config, data_fingerprint), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH_LENGTH]


def run_name(
    config: DictConfig | Mapping[str, Any],
    overrides: Iterable[str],
    data_fingerprint: str | None = None,
) -> str:
    """Returns ``<readable overrides>-<hash>``: letters, digits, ``. _ -`` only, <= 100 bytes."""
    suffix = "-" + run_hash(config, data_fingerprint)
    words = [_readable(override) for override in overrides]
    readable = "-".join(word for word in words if word) or "default"
    return readable[: _NAME_BYTES - len(suffix)].rstrip("-._") + suffix


def experiment_name(config: DictConfig | Mapping[str, Any], overrides: Iterable[str] = ()) -> str:
    """Returns the name of the folder above the run: name, the experiment, or what is learned."""
    container = plain(config)
    if isinstance(container.get("name"), str) and (name := _clean(container["name"])):
        return name[:_NAME_BYTES]
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") == "experiment" and value not in ("", "null"):
            return _clean(value)[:_NAME_BYTES]
    target = (container.get("data") or {}).get("_target_", "")
    return _clean(target.rsplit(".", 1)[-1].lower())[:_NAME_BYTES] or "runs"


def _readable(override: str) -> str:
    """``optimizer.lr=3e-4`` becomes ``lr_3e-4``; what the identity leaves out is not named."""
    key, _, value = override.partition("=")
    key = key.lstrip("+~")
    section, _, rest = key.partition(".")
    last = key.rsplit(".", 1)[-1]
    if section not in (*_SECTIONS, "trainer", "init_from") or last in EXECUTION_KEYS:
        return ""
    if section == "trainer" and last not in _TRAINER_KEYS + _STOPPING_KEYS:
        return ""
    if section == "init_from":
        value = value.rstrip("/").rsplit("/", 1)[-1]
    # A whole group chosen by name speaks for itself: model=mamba_130m.
    return _clean(value) if not rest and section in _SECTIONS else f"{_clean(last)}_{_clean(value)}"


def _clean(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("-._")


def _without(value: Any, dropped: frozenset[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            str(key): _without(item, dropped) for key, item in value.items() if key not in dropped
        }
    if isinstance(value, list | tuple):
        return [_without(item, dropped) for item in value]
    return _canonical(value)


def _canonical(value: Any) -> Any:
    """One spelling per number: a step count typed as 1000 or 1000.0 is the same run."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value
