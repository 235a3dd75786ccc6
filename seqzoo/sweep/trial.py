"""One trial: its runs, one per seed, each an ordinary run folder below the study's."""

import dataclasses
import math
import os
import pathlib
import signal
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from seqzoo.config.compose import compose
from seqzoo.errors import ConfigError, NotFiniteError, Preempted, Pruned
from seqzoo.sweep.claim import Claimed
from seqzoo.sweep.storage import StorageError
from seqzoo.sweep.study import Study
from seqzoo.train import loop
from seqzoo.train.folder import RunFolder
from seqzoo.train.hooks import Hook
from seqzoo.train.hooks.hook import Values
from seqzoo.train.identity import plain
from seqzoo.train.result import Result
from seqzoo.train.run_files import read_metrics, read_status
from seqzoo.train.setup import build_data


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run of a trial, before it is trained.

    Attributes:
        words: its command line.
        config: composed from them.
        path: its folder.
    """

    words: list[str]
    config: Mapping[str, Any]
    path: pathlib.Path


class Ended(NamedTuple):
    """How a run ended: its value, what the test split gave, the seconds that it took."""

    value: float
    test: float | None
    seconds: float


class Watch(Hook):
    """Tells the study every evaluation on the valid split, and ends a run that lags.

    Where the storage stays away, the run saves and stops; `lost` is why.
    """

    name = "sweep"

    def __init__(
        self, claimed: Claimed, path: pathlib.Path, metric: str, *, prunes: bool, first: int
    ):
        self._claimed, self._path, self._metric = claimed, path, metric
        self._prunes, self._first = prunes, first
        self.lost: StorageError | None = None

    def start(self, step: int) -> None:
        """Tells what was evaluated before, and could not be told."""
        name = f"valid/{self._metric}"
        for line in read_metrics(self._path):
            if name in line and line["step"] <= step:
                self._report(line["step"], float(line[name]))

    def evaluated(self, step: int, split: str, values: Values) -> None:
        if split != "valid":
            return
        value = values[self._metric]
        self._report(step, value)
        if self.lost is None and self._prunes and step >= self._first and self._claimed.lags():
            raise Pruned(
                f"ended at step {step}: its {self._metric} {value:.4g} lags behind other trials"
            )

    def _report(self, step: int, value: float) -> None:
        try:
            if self.lost is None:
                self._claimed.report(step, value)
        except StorageError as error:
            self.lost = error
            os.kill(os.getpid(), signal.SIGTERM)  # the train loop saves at the next step boundary


Size = Callable[[pathlib.Path], Mapping[str, float] | None]


def run(study: Study, claimed: Claimed, size: Size = lambda path: None) -> str:
    """Trains what is left of a trial and tells the study its value.

    Args:
        study: whose trial it is.
        claimed: the trial.
        size: what the model of a run folder costs, by name, for the report.

    Returns:
        What became of it, in a few words.

    Raises:
        Preempted: it was asked to stop, and saved; the trial stays as it is.
        LockedError: somebody works in its run folder.
        StorageError: the storage is away; the run was saved.
        SeqzooError: it cannot go on.
    """
    runs = begin(study, claimed)
    watch = watch_of(study, claimed, runs)
    ended: list[Ended] = []
    for number, one in enumerate(runs):
        try:
            ended.append(_train(one, study, [watch] if number == 0 else []))
        except Pruned as error:
            claimed.tell(None)
            return str(error)
        except Preempted:
            if watch.lost is not None:
                raise watch.lost from None
            raise
    return finish(study, claimed, runs, ended, size)


def begin(study: Study, claimed: Claimed) -> list[Planned]:
    """The runs of a trial; the study is told where they lie."""
    runs = plan(study, claimed.words)
    pattern = runs[0].config["model"].get("pattern") or ()
    claimed.note(
        runs=[str(one.path.relative_to(study.path)) for one in runs],
        architecture="+".join(dict.fromkeys(pattern)) or "model",
    )
    return runs


def watch_of(study: Study, claimed: Claimed, runs: Sequence[Planned]) -> Watch:
    """What looks on at the first seed.

    A median over seeds is there at the end only; meanwhile the first seed speaks for all.
    """
    sweep = study.definition.sweep
    prunes, first = sweep.pruner != "none", sweep.pruner_min_step or 0
    return Watch(claimed, runs[0].path, study.definition.metric, prunes=prunes, first=first)


def finish(
    study: Study, claimed: Claimed, runs: Sequence[Planned], ended: Sequence[Ended], size: Size
) -> str:
    """Tells the study how the runs of a trial ended; returns it in a few words."""
    worst = study.definition.worst
    values = [worst if math.isnan(one.value) else one.value for one in ended]
    seconds = sum(one.seconds for one in ended)
    claimed.note(
        values=[str(value) for value in values],  # JSON has no word for what is not finite
        tests=[one.test for one in ended],
        diverged=values.count(worst),
        seconds=round(seconds + claimed.attrs.get("seconds", 0.0), 1),
        size=size(runs[0].path),
    )
    value = statistics.median(values)
    claimed.tell(value)
    return f"{study.definition.metric} {value:.4g}" if math.isfinite(value) else "diverged"


def plan(study: Study, words: Sequence[str]) -> list[Planned]:
    """The runs of a trial: one per seed."""
    first = compose(words, config_dir=study.definition.config_dir)
    seeds = study.definition.sweep.seeds
    if seeds == 1:
        return [_planned(study, list(words), first)]
    kept = [word for word in words if word.lstrip("+").partition("=")[0] != "trainer.seed"]
    seed = first["trainer"]["seed"]
    lines = [[f"trainer.seed={seed + i}", *kept] for i in range(seeds)]
    configs = [compose(line, config_dir=study.definition.config_dir) for line in lines]
    return [_planned(study, *pair) for pair in zip(lines, configs, strict=True)]


def _planned(study: Study, words: list[str], config: Any) -> Planned:
    fingerprint = build_data(config).fingerprint()
    folder = RunFolder.locate(config, words, root=study.path, data_fingerprint=fingerprint)
    return Planned(words, plain(config), folder.path)


def _train(one: Planned, study: Study, hooks: Sequence[Hook]) -> Ended:
    """Trains a run; one that diverged before is not run again."""
    diverged = Ended(study.definition.worst, None, 0.0)
    if read_status(one.path).get("state") == "not_finite":
        return diverged
    try:
        result = loop.train(one.config, overrides=one.words, root=study.path, hooks=hooks)
    except NotFiniteError:
        return diverged
    return ended_with(study, one, result)


def ended_with(study: Study, one: Planned, result: Result) -> Ended:
    """How a run ended that came to its end.

    Raises:
        ConfigError: it is scored by another metric than the study.
    """
    metric = study.definition.metric
    if result.metric != metric:
        raise ConfigError(
            f"{one.path.name} is scored by {result.metric}, the study by {metric}: search tasks "
            "of one metric"
        )
    value = study.definition.worst if result.value is None else result.value
    return Ended(value, result.test.get(metric), result.seconds)
