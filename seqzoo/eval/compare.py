"""A table that ranks runs, and what such a table may claim (contract 6 of the design).

Runs that differ in nothing but their seeds are one row. Nothing is hidden: what is not matched,
too few seeds, and runs that diverged are said beside the table.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from seqzoo.errors import ConfigError
from seqzoo.eval.records import Record
from seqzoo.train.identity import identity

# Contract 6: how far two rows may be apart and still count as matched.
TOLERANCES = {
    "parameters without embeddings": 0.02,
    "state bytes": 0.05,
    "training FLOPs per token": 0.05,
}
SEEDS = 5
LEARNED = 0.95
_RESAMPLES = 10_000


class Size(NamedTuple):
    """What a model costs; see seqzoo.eval.describe."""

    parameters: int
    without_embeddings: int
    state_recurrent: int
    state_total: int
    flops_per_token: float


class Row(NamedTuple):
    """Runs that differ in their seeds alone.

    Attributes:
        label: of its first run.
        records: the runs.
        size: None where it could not be had.
        values: the metric of each run; the worst possible for one that diverged.
        median, low, high: of the values; the 95 % bootstrap interval of the median.
    """

    label: str
    records: Sequence[Record]
    size: Size | None
    values: Sequence[float]
    median: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Rows, best first, and remarks that belong beside them.

    Attributes:
        metric: its name.
        split: "test" where every run was tested, of the step that was best on the valid split;
            else "valid".
        mode: "max" or "min".
        rows: best first.
        matched: on what the rows are matched; empty = nothing.
        remarks: what is not as a comparison should be.
    """

    metric: str
    split: str
    mode: str
    rows: list[Row]
    matched: list[str]
    remarks: list[str]


def compare(records: Sequence[Record], sizes: Mapping[Any, Size]) -> Comparison:
    """Puts runs into one table.

    Args:
        records: of at least one run.
        sizes: by path of the run.

    Raises:
        ConfigError: the runs saw different data, or are scored by different metrics.
    """
    check_same_data(records)
    names = {record.metric.get("name") for record in records if record.metric.get("name")}
    if len(names) > 1:
        raise ConfigError(
            f"the runs are scored by different metrics ({', '.join(sorted(names))}): they do not "
            "share a table"
        )
    metric = next(iter(names), "metric")
    mode = mode_of(metric)
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_without_seeds(record), []).append(record)
    split = "test" if all(metric in r.tested for r in records if not r.diverged) else "valid"
    value = lambda record: _value(record, metric, split)
    rows = [_row(group, mode, value, sizes.get(group[0].path)) for group in groups.values()]
    sign = -1 if mode == "max" else 1
    rows.sort(key=lambda row: (row.median != row.median, sign * row.median))
    matched, remarks = _matching(rows)
    return Comparison(metric, split, mode, rows, matched, remarks + _remarks(rows))


def check_same_data(records: Sequence[Record]) -> None:
    """Refuses runs whose data differ.

    Raises:
        ConfigError: names two runs and their fingerprints.
    """
    seen: dict[str | None, Record] = {}
    for record in records:
        seen.setdefault(record.fingerprint, record)
    if len(seen) > 1:
        first, second = list(seen.values())[:2]
        raise ConfigError(
            f"the runs saw different data: {first.label} has fingerprint {first.fingerprint}, "
            f"{second.label} has {second.fingerprint}. They do not share a table; make one report "
            "for each"
        )


def mode_of(metric: str) -> str:
    """Whether more of a metric is better."""
    return "max" if metric.partition("/")[0] in ("accuracy", "exact") else "min"


def learned(metric: str, value: float | None) -> bool:
    """Whether a run learned the easy form: only then do its slices say anything (contract 6)."""
    return mode_of(metric) != "max" or (value is not None and value >= LEARNED)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median (percentiles, the same draws every time)."""
    if len(values) == 1:
        return values[0], values[0]
    draws = np.random.default_rng(0).choice(np.asarray(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5], method="nearest")
    return float(low), float(high)


def parted(one: Row, other: Row) -> bool:
    """Whether "better" may be said: their intervals do not touch."""
    return one.low > other.high or other.low > one.high


def _row(group: Sequence[Record], mode: str, value, size: Size | None) -> Row:
    worst = float("-inf") if mode == "max" else float("inf")
    values = [worst if one.diverged else value(one) for one in group]
    known = [value for value in values if value == value]
    median = statistics.median(known) if known else float("nan")
    low, high = interval(known) if known else (median, median)
    return Row(group[0].label, group, size, values, median, low, high)


def _value(record: Record, metric: str, split: str) -> float:
    value = record.tested.get(metric) if split == "test" else record.metric.get("value")
    return float("nan") if value is None else float(value)


def _without_seeds(record: Record) -> str:
    """What of a run's configuration decides its result, seeds left out."""
    kept = identity(record.config, record.fingerprint)
    kept.pop("seed", None)
    kept["trainer"].pop("seed", None)
    return json.dumps(kept, sort_keys=True, default=str)


def _matching(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    if len(rows) < 2:
        return [], []
    if any(row.size is None for row in rows):
        return [], ["not checked: the size of a model could not be had"]
    measures = {
        "parameters without embeddings": [row.size.without_embeddings for row in rows],
        "state bytes": [row.size.state_total for row in rows],
        "training FLOPs per token": [row.size.flops_per_token for row in rows],
    }
    apart = {name: spread(values) for name, values in measures.items()}
    matched = [name for name, value in apart.items() if value <= TOLERANCES[name]]
    if matched:
        return matched, []
    text = ", ".join(
        f"{name} by {value:.0%} (at most {TOLERANCES[name]:.0%})" for name, value in apart.items()
    )
    return [], [f"NOT MATCHED: {text}; 'seqzoo show --match' solves for a width or a state"]


def spread(values: Sequence[float]) -> float:
    """How far the largest lies above the smallest, as a share of the smallest."""
    low, high = min(values), max(values)
    return 0.0 if high == low else float("inf") if low == 0 else high / low - 1


def _remarks(rows: Sequence[Row]) -> list[str]:
    found = []
    everyone = [record for row in rows for record in row.records]
    finished = [record for record in everyone if record.status.get("state") == "finished"]
    tokens = {record.tokens for record in finished if record.tokens is not None}
    if len(tokens) > 1:
        found.append(f"NOT MATCHED: tokens read, from {min(tokens):,} to {max(tokens):,}")
    orders = {
        (
            (record.config.get("data") or {}).get("seed"),
            (record.config.get("trainer") or {}).get("global_batch_size"),
        )
        for record in everyone
    }
    if len(orders) > 1 and len(rows) > 1:
        found.append("NOT MATCHED: order of the data (data.seed or trainer.global_batch_size)")
    unfinished = [r.label for r in everyone if r.status.get("state") not in ("finished",)]
    if unfinished:
        found.append(f"not finished: {', '.join(unfinished)}")
    diverged = sum(record.diverged for record in everyone)
    if diverged:
        found.append(f"{diverged} of {len(everyone)} runs diverged and count as worst")
    for row in rows:
        by_seed: dict[Any, list[str]] = {}
        for record in row.records:
            by_seed.setdefault(record.seed, []).append(record.label)
        found += [
            f"the same run, begun again, counts {len(labels)} times: {', '.join(labels)}; give one"
            for labels in by_seed.values()
            if len(labels) > 1
        ]
    few = [row.label for row in rows if len({r.seed for r in row.records}) < SEEDS]
    if len(rows) > 1 and few:
        found.append(
            f"fewer than {SEEDS} seeds: {', '.join(few)}; a ranking needs {SEEDS} fresh ones each"
        )
    if len(rows) > 1 and rows[0].median == rows[0].median:
        best, *others = rows
        tied = [row.label for row in others if not parted(best, row)]
        if tied:
            found.append(f"not better than {', '.join(tied)}: the intervals overlap")
        found.append("tuning is not recorded in run folders: say how many trials each row had")
    for name, what in dict(git="commits", devices="devices", versions="versions").items():
        kinds = {json.dumps(r.last_start.get(name), sort_keys=True) for r in everyone}
        if len(kinds) > 1:
            found.append(f"{what} differ between the runs")
    return found
