"""The settings of a sweep: sections sweep and launcher."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from seqzoo.config.compose import compose_settings
from seqzoo.config.schema import SWEEP_SETTINGS
from seqzoo.errors import ConfigError, suggest

SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("none", "median", "halving")
LAUNCHERS = ("local", "slurm", "submitit_slurm", "submitit_local")
CARRIERS = ("map", "vmap")
# What members of a vectorised group may differ in: run-time values of the compiled step, and the
# scale of initial values (model.embed_std, and any init_std of a part of the model).
VECTORIZED = (
    "trainer.seed",
    "data.seed",
    "optimizer.lr",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
)


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
        vectorize: settings, as in [optimizer.lr,trainer.seed]; runs that differ in these alone are
            trained together, by one program in one process.
        vectorize_by: map = one after the other inside the program, vmap = batched; null = map on a
            CPU, vmap on an accelerator.
        vectorize_most: runs in one group.
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
    vectorize: list[str] = dataclasses.field(default_factory=list)
    vectorize_by: str | None = None
    vectorize_most: int = 16

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ConfigError(
                f"sweep.name={self.name}; it names a folder: letters, digits, '.', '_' and '-' "
                "only, a letter or a digit first"
            )
        _one_of("sweep.sampler", self.sampler, SAMPLERS)
        _one_of("sweep.pruner", self.pruner, PRUNERS)
        _at_least("sweep", self, 1, "n_trials", "seeds", "pruner_min_step", "pruner_startup")
        _at_least("sweep", self, 1, "vectorize_most")
        _at_least("sweep", self, 2, "pruner_factor")
        _at_least("sweep", self, 0, "seed", "max_failures", "patience_minutes")
        if self.vectorize_by is not None:
            _one_of("sweep.vectorize_by", self.vectorize_by, CARRIERS)
        if self.vectorize:
            self._check_vectorize()

    def _check_vectorize(self) -> None:
        for key in self.vectorize:
            if key not in VECTORIZED and not is_initial_scale(key):
                raise ConfigError(
                    f"sweep.vectorize holds {key}{suggest(key, VECTORIZED)}: runs of a group share "
                    "one compiled program and its steps. They may differ in "
                    f"{', '.join(VECTORIZED)}, model.embed_std, and init_std of parts of the "
                    f"model. Leave {key} searched as it is: its values make groups of their own"
                )
        if self.sampler == "tpe":
            raise ConfigError(
                "sweep.sampler=tpe draws each point from trials that have ended, and those of a "
                "group run together: take sweep=grid or sweep=random, or leave sweep.vectorize out"
            )
        if self.pruner != "none":
            raise ConfigError(
                f"sweep.pruner={self.pruner} ends trials to save their time, but runs of a group "
                "are one program: set sweep.pruner=none, or leave sweep.vectorize out"
            )
        if self.seeds > 1 and "trainer.seed" not in self.vectorize:
            raise ConfigError(
                f"sweep.seeds={self.seeds}: the seeds of a trial run together, so put trainer.seed "
                "into sweep.vectorize"
            )


def is_initial_scale(key: str) -> bool:
    """Whether a setting is a standard deviation that initial values are drawn with."""
    section, _, rest = key.partition(".")
    last = rest.rpartition(".")[2]
    return section == "model" and (last == "embed_std" or last.endswith("init_std"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LauncherSettings:
    """Where workers run; for `seqzoo train -m` where its runs do.

    Attributes:
        kind: local or slurm; of `seqzoo train -m`: local, submitit_slurm or submitit_local.
        workers: on this machine, or per node; null = one per GPU, on a CPU as many as its threads
            allow. Of submitit: jobs that may run at a time.
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
