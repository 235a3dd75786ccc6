"""Beginning a run from a step of another one: init_from=RUN@STEP, reset=[optimizer,schedule,data].

Without reset everything goes on: the step count (and with it the schedule), the optimizer's
moments, the position in the data. What reset names starts afresh.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqzoo.config.signature import with_defaults
from seqzoo.errors import CheckpointError, ConfigError
from seqzoo.train import checkpoint, manifest
from seqzoo.train.folder import RunFolder
from seqzoo.train.identity import EXECUTION_KEYS
from seqzoo.train.setup import Setup, initial_state
from seqzoo.train.state import TrainState
from seqzoo.train.values import reset_of


class Branch(NamedTuple):
    """Where a run begins.

    Attributes:
        path: the run folder of the trunk.
        step: the step there.
        reset: what it leaves behind.
    """

    path: pathlib.Path
    step: int
    reset: tuple[str, ...]


class Beginning(NamedTuple):
    """What a run begins with: a state, the next sample of its data, how many tokens its steps have
    read (None = not known), and which settings of the model are not the trunk's, though its arrays
    fit."""

    state: TrainState
    next_sample: int
    tokens: int | None
    changed: list[str]


def find(config: Mapping[str, Any], step: int | None = None) -> Branch | None:
    """Reads init_from and reset and finds the step that they mean.

    Args:
        config: plain.
        step: where the run began at its first start, for one that must begin again: @best may
            mean another step of the trunk by now. None = this is the first start.

    Raises:
        ConfigError: there is no such run or step, or reset names something else.
    """
    text, reset = config.get("init_from"), reset_of(config)
    if not text:
        return None
    name, at, word = str(text).rpartition("@")
    name, word = (name, word) if at else (word, "last")
    path = pathlib.Path(name)
    if path.is_symlink():
        raise ConfigError(
            f"init_from={text}: '{path.name}' moves from run to run, and the same command must "
            f"begin at the same place; write init_from={path.resolve()}@{word}"
        )
    if not (path / "checkpoints").is_dir():
        raise ConfigError(f"init_from={text}: {name} is no run folder with checkpoints")
    try:
        found = checkpoint.find_step(path / "checkpoints", word if step is None else step)
    except CheckpointError as error:
        before = "" if step is None else f" was step {step} at the first start, and"
        raise ConfigError(f"init_from={text}:{before} {error}") from error
    return Branch(path, int(found.name), reset)


def of(folder: RunFolder, config: Mapping[str, Any], *, fresh: bool = False) -> Branch | None:
    """Where a run begins, by its folder; None = at its own start, or at a checkpoint of its own.

    Args:
        folder: of the run, open or not.
        config: plain.
        fresh: the run begins anew: what lies in the folder is not looked at.

    Raises:
        ConfigError: as `find`.
    """
    if not fresh and checkpoint.list_steps(folder.checkpoints):
        return None
    return find(config, None if fresh else folder.branch_step)


def moved(folder: RunFolder, config: Mapping[str, Any]) -> list[str]:
    """What to say where init_from=RUN@best means another step by now than at the first start."""
    begun = folder.branch_step
    try:
        now = None if begun is None else find(config)
    except ConfigError:  # the trunk is gone: it is needed no more
        return []
    if now is None or now.step == begun:
        return []
    return [
        f"init_from={config['init_from']} was step {begun} when this run began and is step "
        f"{now.step} now; this run stays with {begun}, init_from={now.path}@{now.step} is another"
    ]


def begin(branch: Branch, run: Setup, data_fingerprint: str) -> Beginning:
    """Reads the step of the trunk into a state of this run.

    Raises:
        ConfigError: the two do not fit together; the text says what to reset.
        CheckpointError: the step is damaged, or of another model.
    """
    place = branch.path / "checkpoints" / str(branch.step)
    try:
        stored = checkpoint.read_meta(place)["arrays"]
        restored = checkpoint.read_step(place, _wanted(branch, run, stored), partial=True)
    except checkpoint.Damaged as error:
        raise CheckpointError(f"init_from: {place} is damaged: {error}") from error
    position = restored.meta["data"]
    # None: an import that read no data, and so has no place in any.
    if "data" not in branch.reset and position["fingerprint"] not in (None, data_fingerprint):
        raise ConfigError(
            f"init_from={branch.path}: that run read other data ({position['fingerprint']}; here "
            f"it is {data_fingerprint}); start the data anew with reset=[data]"
        )
    step = 0 if "schedule" in branch.reset else restored.step
    if step >= run.trainer.steps:
        raise ConfigError(
            f"trainer.steps={run.trainer.steps} is over at step {step}, where the branch begins; "
            "raise it, or start the schedule anew with reset=[schedule]"
        )
    state = initial_state(run)._replace(**restored.state)
    if state.ema is not None and "ema" not in restored.state:
        state = state._replace(ema=jax.tree.map(jnp.copy, state.params))
    state = state._replace(step=jax.device_put(np.int32(step), run.state.step.sharding))
    next_sample = 0 if "data" in branch.reset else position["next_sample"]
    theirs = restored.meta["config"]["model"]
    changed = sorted(changed_settings(theirs, run.config["model"], "model"))
    tokens = restored.meta.get("tokens") if step else 0
    return Beginning(state, next_sample, tokens, changed)


def changed_settings(theirs: Any, ours: Any, key: str) -> Iterator[str]:
    """``model.norm_eps was 1e-06, is 1e-05``: settings that the trunk had too, and otherwise."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        if "_target_" in theirs and "_target_" in ours:
            theirs, ours = with_defaults(theirs), with_defaults(ours)
        for name in theirs.keys() & ours.keys() - EXECUTION_KEYS:
            yield from changed_settings(theirs[name], ours[name], f"{key}.{name}")
    elif theirs != ours and None not in (theirs, ours):  # None: the constructor works it out
        yield f"{key} was {theirs}, is {ours}"


def _wanted(branch: Branch, run: Setup, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of the state that the trunk gives."""
    wanted = {"params": run.state.params, "rest": run.state.rest}
    if run.state.ema is not None and any(name.startswith("ema/") for name in stored):
        wanted["ema"] = run.state.ema
    if "optimizer" in branch.reset:
        return wanted
    moments = {"opt_state": run.state.opt_state}
    ours = manifest.flatten(moments)
    theirs = [name for name in stored if name.startswith("opt_state/")]
    difference = manifest.differences(stored, ours) or next(
        (f"it has '{name}', which is not used here" for name in theirs if name not in ours), None
    )
    if difference and not manifest.differences(stored, manifest.flatten(wanted)):
        raise ConfigError(
            f"init_from={branch.path}: its optimizer does not fit ({difference}); start anew with "
            "reset=[optimizer]"
        )
    return wanted | moments
