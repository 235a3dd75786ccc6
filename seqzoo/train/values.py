"""What a configuration holds beside the model, built without a device: so wrong values are found.

`seqzoo show`, `seqzoo train -m` and sweeps ask here before the first run begins.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig

from seqzoo.config.build import build
from seqzoo.data.source import Dataset
from seqzoo.errors import ConfigError, suggest
from seqzoo.tasks.task import Task
from seqzoo.train import mesh as meshes
from seqzoo.train.identity import plain
from seqzoo.train.optimizer import Optimizer
from seqzoo.train.schedule import check_lengths
from seqzoo.train.settings import LoggerSettings, MeshSettings, TrainerSettings

RESETS = ("optimizer", "schedule", "data")


class Values(NamedTuple):
    """Everything of a run but its model and its devices.

    Attributes:
        trainer, mesh, logger: settings of the sections of these names.
        data: where rows come from; nothing is read yet.
        task: what is asked of them.
        optimizer: with its run-time values.
        schedule: `schedule(step, steps)` is the factor of the learning rate.
    """

    trainer: TrainerSettings
    mesh: MeshSettings
    logger: LoggerSettings
    data: Dataset
    task: Task
    optimizer: Optimizer
    schedule: Any


def values_of(config: DictConfig | Mapping[str, Any], *, data: Dataset | None = None) -> Values:
    """Builds them.

    Args:
        config: resolved and checked.
        data: the data set, where it was built already.

    Raises:
        ConfigError: a value is out of range, or two do not fit together.
    """
    config = plain(config)
    trainer = TrainerSettings(**config["trainer"])
    mesh, logger = MeshSettings(**config["mesh"]), LoggerSettings(**config["logger"])
    data = build(config["data"]) if data is None else data
    task = _checked(build(config["task"]).for_data(data))
    if trainer.eval_chunk_length is not None and not getattr(task, "in_chunks", False):
        raise ConfigError(
            f"trainer.eval_chunk_length={trainer.eval_chunk_length}, but this task needs whole "
            "rows; set it to null"
        )
    optimizer, schedule = build(config["optimizer"]), build(config["schedule"])
    return Values(trainer, mesh, logger, data, task, optimizer, schedule)


def check_values(config: DictConfig | Mapping[str, Any]) -> None:
    """Asks whether every value of a run that is to be trained is allowed; starts no device.

    Args:
        config: composed and checked (seqzoo.config.compose).

    Raises:
        ConfigError: one is not; the text names its key, the value and what is allowed.
    """
    config = plain(config)
    values = values_of(config)
    meshes.rules_of(values.mesh)
    check_lengths(values.schedule, values.trainer.steps)
    reset_of(config)


def reset_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a run that begins from a step of another one leaves behind.

    Raises:
        ConfigError: reset names something else, or stands without init_from.
    """
    reset = tuple(config.get("reset") or ())
    shown = f"reset=[{','.join(map(str, reset))}]"
    for word in reset:
        if word not in RESETS:
            raise ConfigError(
                f"{shown} names '{word}'; allowed: {', '.join(RESETS)}{suggest(str(word), RESETS)}"
            )
    if reset and not config.get("init_from"):
        raise ConfigError(
            f"{shown} says what init_from leaves behind, and init_from is null; set "
            "init_from=RUN@STEP, or leave reset out"
        )
    return reset


def _checked(task: Task) -> Task:
    """Refuses a metric of a group of rows that the data does not have."""
    _, slash, group = task.metric.partition("/")
    groups = tuple(getattr(task, "groups", ()))
    if slash and (group not in groups or len(groups) < 2):
        raise ConfigError(
            f"task.metric={task.metric}: the data has no such group of rows{suggest(group, groups)}"
            f"; it has {', '.join(groups) if len(groups) > 1 else 'none'}"
        )
    return task
