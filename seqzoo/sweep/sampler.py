"""Where the points of trials come from.

Grid and random points are a function of (study seed, n) and wait in the study from its creation.
TPE learns from what is finished; what it draws is seeded by (study seed, trial number), so workers
that ask at the same time never draw the same point.
"""

import hashlib
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, Trial

from seqzoo.errors import ConfigError
from seqzoo.sweep.settings import SweepSettings
from seqzoo.sweep.space import Parameter, Space

_DEFAULT_TRIALS = 20


class SeededTPE(BaseSampler):
    """TPE whose draw for a trial depends on the study's seed, the trial, and what is finished."""

    def __init__(self, seed: int):
        self._seed = seed

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        text = f"{self._seed}/{trial.number}/{param_name}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        return TPESampler(seed=seed).sample_independent(
            study, trial, param_name, param_distribution
        )


def points(space: Space, settings: SweepSettings) -> list[dict[str, Any]]:
    """What waits in the study from the beginning; TPE's points are empty until they are asked for.

    Raises:
        ConfigError: sampler, space and number of trials do not fit together.
    """
    if settings.seeds > 1 and any(one.word.setting == "trainer.seed" for one in space.parameters):
        raise ConfigError(
            f"sweep.seeds={settings.seeds}, and trainer.seed is searched: replicas take "
            "trainer.seed and the seeds after it; leave one of the two out"
        )
    if settings.sampler == "grid":
        found = space.grid()
        if settings.n_trials not in (None, len(found)):
            raise ConfigError(
                f"sweep.n_trials={settings.n_trials}, but the grid has {len(found)} points: leave "
                "n_trials out, or take sweep.sampler=random for a part of them"
            )
        return found
    n = settings.n_trials or _DEFAULT_TRIALS
    if not space.parameters:
        raise ConfigError(
            "nothing is searched: give a setting several values, as in optimizer.lr=1e-3,3e-3"
        )
    return space.random(settings.seed, n) if settings.sampler == "random" else [{}] * n


def suggest(trial: Trial, one: Parameter) -> Any:
    """Asks Optuna for the value of a parameter."""
    found = one.distribution
    if isinstance(found, CategoricalDistribution):
        return trial.suggest_categorical(one.name, found.choices)
    if isinstance(found, IntDistribution):
        return trial.suggest_int(one.name, found.low, found.high, step=found.step, log=found.log)
    return trial.suggest_float(one.name, found.low, found.high, step=found.step, log=found.log)


def pruner(settings: SweepSettings, eval_every: int) -> BasePruner:
    """Optuna's pruner for the settings."""
    first = settings.pruner_min_step or eval_every or 1
    if settings.pruner == "median":
        return MedianPruner(settings.pruner_startup, n_warmup_steps=first - 1)
    if settings.pruner == "halving":
        return SuccessiveHalvingPruner(min_resource=first, reduction_factor=settings.pruner_factor)
    return NopPruner()
