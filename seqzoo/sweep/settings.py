"""The settings of a sweep: sections sweep and launcher."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from seqzoo.config.compose import compose_settings
from seqzoo.config.schema import SWEEP_SETTINGS
from seqzoo.errors import ConfigError, suggest

SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("none", "median", "halving")
LAUNCHERS = ("local", "slurm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """How a space is searched.

    Attributes:
        name: the study's name, and that of its folder; null = made from what is searched.
        sampler: tpe, random or grid.
        n_trials: trials in all, however often the command is typed; null = the whole grid, and 20
            for other samplers.
        seeds: runs per trial, at trainer.seed and the seeds after it; their median counts.
        seed: of the sampler.
        pruner: none, median or halving: ends trials that lag, at an evaluation.
        pruner_min_step: no trial ends before this step; null = trainer.eval_every.
        pruner_startup: of median: trials that end whole before any is ended.
        pruner_factor: of halving: one of so many goes on from each rung to the next.
        max_failures: trials that may fail; one more ends the sweep with exit 1.
        storage: a database URL; null = SEQZOO_STORAGE, else journal.log in the study's folder.
        patience_minutes: for a storage that cannot be reached, before workers save and stop.
    """

    name: str | None = None
    sampler: str = "tpe"
    n_trials: int | None = None
    seeds: int = 1
    seed: int = 0
    pruner: str = "none"
    pruner_min_step: int | None = None
    pruner_startup: int = 4
    pruner_factor: int = 3
    max_failures: int = 3
    storage: str | None = None
    patience_minutes: float = 5.0

    def __post_init__(self) -> None:
        _one_of("sweep.sampler", self.sampler, SAMPLERS)
        _one_of("sweep.pruner", self.pruner, PRUNERS)
        _at_least("sweep", self, 1, "n_trials", "seeds", "pruner_min_step", "pruner_startup")
        _at_least("sweep", self, 2, "pruner_factor")
        _at_least("sweep", self, 0, "seed", "max_failures", "patience_minutes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LauncherSettings:
    """Where workers run.

    Attributes:
        kind: local or slurm.
        workers: on this machine, or per node; null = one per GPU, on a CPU as many as its threads
            allow.
        threads: CPU threads of a worker, fixed when the study is created, since they change bits;
            null = two, or what `workers` leaves for each.
        nodes: of slurm: whole nodes.
        gpus_per_node: of slurm: all of them are used; 0 = CPU nodes.
        minutes: of slurm: before the job ends; it saves two minutes earlier and requeues itself.
        partition: of slurm.
        account: of slurm.
        options: of slurm: further #SBATCH options, as in ['--qos=long'].
        setup: of slurm: shell lines before the workers start, as in ['module load cuda'].
    """

    kind: str = "local"
    workers: int | None = None
    threads: int | None = None
    nodes: int = 1
    gpus_per_node: int = 8
    minutes: int = 240
    partition: str | None = None
    account: str | None = None
    options: list[str] = dataclasses.field(default_factory=list)
    setup: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        _one_of("launcher.kind", self.kind, LAUNCHERS)
        _at_least("launcher", self, 1, "workers", "threads", "nodes")
        _at_least("launcher", self, 0, "gpus_per_node")
        _at_least("launcher", self, 5, "minutes")
        if self.kind == "slurm" and self.workers and self.workers < self.gpus_per_node:
            raise ConfigError(
                f"launcher.workers={self.workers}, launcher.gpus_per_node={self.gpus_per_node}: "
                "GPUs of a whole node would stand idle; leave launcher.workers out"
            )


class Settings(NamedTuple):
    """Both sections, and the words that are neither: those of every trial."""

    sweep: SweepSettings
    launcher: LauncherSettings
    words: list[str]


def split(words: Sequence[str], *, config_dir: str | None = None) -> Settings:
    """Parts a command line into settings of the sweep and words of its trials.

    Raises:
        ConfigError: a setting does not exist or has a wrong value.
    """
    ours = [word for word in words if _section(word) in SWEEP_SETTINGS]
    found: dict[str, Any] = compose_settings("sweep", ours, SWEEP_SETTINGS, config_dir=config_dir)
    rest = [word for word in words if word not in ours]
    return Settings(SweepSettings(**found["sweep"]), LauncherSettings(**found["launcher"]), rest)


def _section(word: str) -> str:
    return word.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value}{suggest(value, allowed)}; allowed: {', '.join(allowed)}")


def _at_least(section: str, settings: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{section}.{name}={value}; it must be at least {least}")
