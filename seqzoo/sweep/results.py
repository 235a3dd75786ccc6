"""The trials of a study as tables and plots read them, and what may be said of architectures.

All comes from the study's storage, so that a thousand trials are quick.
"""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from seqzoo.eval.compare import LEARNED, SEEDS, interval, learned
from seqzoo.sweep.rows import Row
from seqzoo.sweep.study import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial.

    Attributes:
        number: of the trial.
        state: waiting, running, interrupted, finished, diverged, pruned or failed.
        point: what was chosen: parameter to number or text.
        value: the median over its seeds of the metric on the valid split; None = not ended.
        values: of each seed; the worst possible for one that diverged.
        tests: of each seed, on the test split, where that was looked at.
        diverged: how many seeds did.
        architecture: its mixers.
        size: what its model costs, by name; empty where that could not be had.
        seconds: of training, all seeds.
        runs: its run folders.
        failure: what went wrong.
    """

    number: int
    state: str
    point: Mapping[str, Any]
    value: float | None
    values: Sequence[float]
    tests: Sequence[float]
    diverged: int
    architecture: str
    size: Mapping[str, float]
    seconds: float | None
    runs: Sequence[pathlib.Path]
    failure: str | None

    @property
    def lr(self) -> float | None:
        """Its learning rate, where that was searched."""
        for name, value in self.point.items():
            key = name.partition(" if ")[0]
            if key.rpartition(".")[2] == "lr" and isinstance(value, int | float):
                return float(value)
        return None

    @property
    def ended(self) -> bool:
        """Whether it has a value that counts in a comparison; diverged counts as worst."""
        return self.state in ("finished", "diverged")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """A study.

    Attributes:
        name: of the study.
        metric: what trials are scored by.
        mode: max or min.
        sampler: how points were chosen.
        seeds: per trial.
        space: what was searched, as typed.
        trials: all.
        importances: of parameters, by name.
    """

    name: str
    metric: str
    mode: str
    sampler: str
    seeds: int
    space: Mapping[str, str]
    trials: Sequence[Trial]
    importances: Mapping[str, float]

    @property
    def architectures(self) -> dict[str, list[Trial]]:
        """Trials by architecture, the one with the best trial first."""
        found: dict[str, list[Trial]] = {}
        for trial in self.trials:
            if trial.architecture:
                found.setdefault(trial.architecture, []).append(trial)
        best = {name: self.best(trials) for name, trials in found.items()}
        ranked = sorted(found, key=lambda name: self._rank(best[name]))
        return {name: found[name] for name in ranked}

    def best(self, trials: Sequence[Trial]) -> Trial | None:
        """The best that ended; of equals the first."""
        ended = [trial for trial in trials if trial.ended]
        return min(ended, key=self._rank, default=None)

    def _rank(self, trial: Trial | None) -> float:
        if trial is None or trial.value is None or math.isnan(trial.value):
            return math.inf
        return -trial.value if self.mode == "max" else trial.value


def results(study: Study) -> Results:
    """Reads a study."""
    told = study.definition
    return Results(
        name=told.name,
        metric=told.metric,
        mode=told.mode,
        sampler=told.sweep.sampler,
        seeds=told.sweep.seeds,
        space=told.space,
        trials=[_trial(study, row) for row in study.rows()],
        importances=study.importances(),
    )


def _trial(study: Study, row: Row) -> Trial:
    attrs = row.attrs
    size = attrs.get("size")
    tests = [value for value in attrs.get("tests") or [] if value is not None]
    return Trial(
        number=row.number,
        state=row.state,
        point={name: number(value) for name, value in row.point.items()},
        value=row.value,
        values=[float(value) for value in attrs.get("values") or []],
        tests=[value for value in tests if math.isfinite(value)],
        diverged=attrs.get("diverged") or 0,
        architecture=attrs.get("architecture") or "",
        size=size if isinstance(size, dict) else {},
        seconds=attrs.get("seconds"),
        runs=[study.path / name for name in attrs.get("runs") or []],
        failure=attrs.get("failure") or None,
    )


def number(value: Any) -> Any:
    """A value of a choice, which the study holds as text, as the number that it spells."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def best_rows(found: Results) -> list[dict[str, Any]]:
    """One row per architecture: its best trial, with the spread over seeds."""
    rows = []
    for name, trials in found.architectures.items():
        best = found.best(trials)
        counts = {
            state: sum(trial.state == state for trial in trials)
            for state in ("finished", "pruned", "diverged", "failed")
        }
        row: dict[str, Any] = {"architecture": name, "trials": len(trials), **counts}
        if best is not None:
            row |= {"best": best.number, f"{found.metric} (valid)": best.value}
            row |= spread(best.values, "valid")
            if best.tests:
                row[f"{found.metric} (test)"] = statistics.median(best.tests)
                row |= spread(best.tests, "test")
            row |= {key.partition(" if ")[0]: value for key, value in best.point.items()}
            row |= {
                "parameters without embeddings": best.size.get("without_embeddings"),
                "state bytes, recurrent": best.size.get("state_recurrent"),
                "state bytes, all": best.size.get("state_total"),
                "training FLOPs per token": best.size.get("flops_per_token"),
            }
        rows.append(row)
    return rows


def spread(values: Sequence[float], split: str) -> dict[str, str]:
    """Smallest to largest, and the 95 % bootstrap interval of the median."""
    if len(values) < 2:
        return {}
    low, high = interval(values)
    return {
        f"min - max ({split})": f"{min(values):.4g} - {max(values):.4g}",
        f"95 % ({split})": f"{low:.4g} - {high:.4g}",
    }


def remarks(found: Results) -> list[str]:
    """What is not as a comparison should be (contract 6 of the design)."""
    told = []
    groups = found.architectures
    counts = {name: len(trials) for name, trials in groups.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        told.append(f"NOT TUNED ALIKE: trials per architecture differ: {listed}")
    if found.seeds < SEEDS and len(groups) > 1:
        told.append(
            f"fewer than {SEEDS} seeds per trial: take the best settings to {SEEDS} fresh seeds "
            "before ranking architectures (trainer.seed=...)"
        )
    diverged = sum(trial.diverged for trial in found.trials)
    if diverged:
        told.append(f"{diverged} runs diverged and count as worst")
    pruned = sum(trial.state == "pruned" for trial in found.trials)
    if pruned:
        told.append(f"{pruned} trials were ended early, so their values are of fewer steps")
    open_ = sum(trial.state in ("waiting", "running", "interrupted") for trial in found.trials)
    if open_:
        told.append(f"not finished: {open_} of {len(found.trials)} trials")
    for name, trials in groups.items():
        told += _at_the_edge(found, name, trials)
        best = found.best(trials)
        value = None if best is None else best.value
        if value is not None and not learned(found.metric, value):
            told.append(f"{name}: not learned (best {value:.3g}, below {LEARNED})")
    if len(groups) > 1:
        told += _overlaps(found)
    return told


def _at_the_edge(found: Results, name: str, trials: Sequence[Trial]) -> list[str]:
    best = found.best(trials)
    rates = sorted({trial.lr for trial in trials if trial.lr is not None})
    if best is None or best.lr is None or len(rates) < 3 or found.sampler != "grid":
        return []
    if best.lr not in (rates[0], rates[-1]):
        return []
    return [f"{name}: the best learning rate {best.lr:g} is at the edge of the grid: widen it"]


def _overlaps(found: Results) -> list[str]:
    best = {name: found.best(trials) for name, trials in found.architectures.items()}
    spans = {name: interval(one.values) for name, one in best.items() if one and one.values}
    if len(spans) < 2 or found.seeds < 2:
        return []
    first, *others = spans
    low, high = spans[first]
    tied = [name for name in others if spans[name][0] <= high and low <= spans[name][1]]
    return [f"{first} is not better than {', '.join(tied)}: intervals overlap"] if tied else []
