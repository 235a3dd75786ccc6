"""Evaluating a run: on its own test split, or on other data by overrides."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jax
from omegaconf import OmegaConf

from seqzoo.config import paths, schema
from seqzoo.config.compose import compose, parse, sizes_that_differ
from seqzoo.data.source import Split
from seqzoo.errors import ConfigError
from seqzoo.load import Run
from seqzoo.train import environment
from seqzoo.train.evaluate import evaluate
from seqzoo.train.run_files import write_json
from seqzoo.train.setup import setup

# What an evaluation may change: the rest is what was trained.
_SECTIONS = ("data", "task")
_TRAINER = ("eval_batch_size", "eval_chunk_length", "workers", "prefetch", "precision")
# Of mixers, what published protocols change without training: the rate of a signal, and how far
# chunks of attention reach.
_MIXER = ("resample", "chunk_size")

_MOST_LETTERS = 140  # of overrides in the name of a file


def evaluate_run(
    run: Run,
    overrides: Sequence[str] = (),
    *,
    split: Split = "test",
    max_samples: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Evaluates a run and writes report/eval-SPLIT[-OVERRIDES].json, whose content it returns.

    Where the run folder cannot be written, it says so and returns the content alone.

    Args:
        run: from `seqzoo.load`.
        overrides: other data, as in ``["data.seq_len=256"]``; or a mixer's resample or chunk_size.
        split: "train", "valid" or "test".
        max_samples: so many rows, spread evenly, rounded up for each shape of rows; None = all.
        say: gets announcements.

    Raises:
        ConfigError: an override names nothing that an evaluation may change.
    """
    config = changed(run.config, overrides)
    # One device, as the run was loaded: where it was trained does not matter here.
    prepared = setup(config | {"mesh": {}}, devices=jax.local_devices()[:1])
    values = evaluate(prepared, run.params, run.rest, split, max_samples=max_samples, say=say)
    found = {
        "run": run.path.name,
        "step": run.step,
        "split": split,
        "overrides": list(overrides),
        "max_samples": max_samples,
        "metrics": values,
        "data_fingerprint": prepared.data.fingerprint(),
        "data": config["data"],
        "task": config["task"],
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git": environment.git_state(),
        "versions": environment.versions(),
        "devices": environment.devices(),
    }
    file = run.path / "report" / file_name(split, overrides)
    try:
        file.parent.mkdir(exist_ok=True)
        write_json(file, found)
    except OSError as error:  # a folder of somebody else, a full disk
        say(f"warning: {file} cannot be written ({error.strerror}); the figures are shown alone")
    return found


def file_name(split: str, overrides: Sequence[str]) -> str:
    """``eval-test-data.seq_len_256.json``: the same evaluation replaces its file."""
    words = "-".join(re.sub(r"[^A-Za-z0-9._-]+", "_", word) for word in overrides)
    if len(words) > _MOST_LETTERS:  # what is cut off may be what tells two evaluations apart
        words = words[:_MOST_LETTERS] + "-" + hashlib.sha256(words.encode()).hexdigest()[:8]
    return f"eval-{split}" + (f"-{words}" if words else "") + ".json"


def changed(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A stored configuration with other data, task or evaluation settings.

    Args:
        config: of a run, plain and trusted.
        overrides: ``data.seq_len=256``, or ``data=text data.path=...`` for other data altogether.

    Raises:
        ConfigError: a key is unknown, is of the wrong type, or is not an evaluation's to change.
    """
    where = [paths.shipped()]
    found = dict(config)
    typed = parse(overrides)
    for one in typed:
        if one.is_sweep_override():
            raise ConfigError(
                f"{one.input_line} names several values; evaluate one after the other"
            )
    chosen = [one.key_or_group for one in typed if paths.is_group(one.key_or_group, where)]
    for section in chosen:
        if section not in _SECTIONS:
            raise _not_ours(section)
    if chosen:
        fresh = compose(
            [one.input_line for one in typed if one.key_or_group.split(".")[0] in chosen]
        )
        for section in chosen:
            found[section] = OmegaConf.to_container(fresh[section], resolve=True)
    for one in typed:
        section, *keys = one.key_or_group.split(".")
        if section in chosen:
            continue
        of_mixer = section == "model" and keys[:1] == ["mixers"] and keys[-1] in _MIXER
        if section not in (*_SECTIONS, "trainer") and section in found and not of_mixer:
            raise _not_ours(one.key_or_group)
        if (
            section == "trainer"
            and keys
            and keys[0] in found["trainer"]
            and keys[0] not in _TRAINER
        ):
            raise _not_ours(one.key_or_group)
        _set(found, [section, *keys], one.value())
    checked = schema.check(found)
    for name, model, data, what in sizes_that_differ(checked):
        raise ConfigError(f"data.{name}={data} is more than the model knows ({model}): {what}")
    return checked


def _set(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Sets a nested key; mappings on the way are copied, the caller's stay as they were."""
    for key in keys[:-1]:
        inner = tree.get(key)
        tree[key] = dict(inner) if isinstance(inner, Mapping) else {}
        tree = tree[key]
    tree[keys[-1]] = value


def _not_ours(key: str) -> ConfigError:
    return ConfigError(
        f"{key} belongs to what was trained; an evaluation may change data, task, "
        f"{', '.join(f'trainer.{name}' for name in _TRAINER)} and of mixers {', '.join(_MIXER)}"
    )
