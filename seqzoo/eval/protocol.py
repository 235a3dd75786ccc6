"""Contract 6 in code: every row tuned alike on one seed, then fresh seeds, then what may be said.

For the drivers in experiments/. Kill one and start it again: finished runs are found by their
configuration, the one in hand goes on.
"""

import csv
import math
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from seqzoo.config.compose import compose
from seqzoo.errors import NotFiniteError, SeqzooError
from seqzoo.eval.compare import LEARNED, interval, mode_of
from seqzoo.train import loop
from seqzoo.train.run_files import read_metrics

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
STEP = 3.0  # of the grid, beyond its edges
SEEDS = (1, 2, 3, 4, 5)


def train(words: Sequence[str]) -> dict[str, Any]:
    """Trains, or finds what is there.

    Args:
        words: the run's command line; its task's metric is one of which more is better.

    Returns:
        valid (its best), first (the step that reached it, or LEARNED), test, diverged (0 or 1),
        seconds, and path, None where it diverged: such a run counts as worst.

    Raises:
        ValueError: less of the metric is better.
        SystemExit: it was stopped or cannot run; with the exit code of `seqzoo train`.
    """
    print("-- " + " ".join(words), flush=True)
    words = list(words)
    config = compose(words)
    metric = config["task"]["metric"]
    if mode_of(metric) == "min":
        raise ValueError(f"task.metric={metric}: rows are chosen by a metric that is to be large")
    try:
        result = loop.train(config, overrides=words)
    except NotFiniteError:
        return dict(valid=0.0, first=math.inf, test=0.0, diverged=1, seconds=None, path=None)
    except SeqzooError as error:  # the driver ends as the command would: 75 when it was stopped
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    reached, name = min(result.value, LEARNED), f"valid/{metric}"
    steps = (n["step"] for n in read_metrics(result.path) if n.get(name, -math.inf) >= reached)
    return dict(
        valid=result.value,
        first=next(steps),
        test=result.test[metric],
        diverged=0,
        seconds=round(result.seconds, 1) or None,
        path=result.path,
    )


def rank(run: Mapping[str, Any]) -> tuple[float, float]:
    """Orders runs by the valid split; of equals, as where all learn all, by who was sooner."""
    return run["valid"], -run["first"]


def tuned(
    valid: Callable[[float], Any], rates: Sequence[float] = RATES, step: float = STEP
) -> tuple[float, int]:
    """Finds the learning rate that is best on the valid split: the largest `rank`, or the like.

    A best value at an edge of the grid widens it, up to three times as many rates.

    Returns:
        The rate, and how many were tried.
    """
    found = {rate: valid(rate) for rate in rates}
    while len(found) < 3 * len(rates):
        best = max(found, key=lambda rate: found[rate])
        if best == min(found):
            rate = best / step
        elif best == max(found):
            rate = best * step
        else:
            break
        found[rate] = valid(rate)
    return max(found, key=lambda rate: found[rate]), len(found)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest, and the 95 % interval of the median."""
    low, high = interval(values)
    told = dict(
        median=statistics.median(values),
        low=min(values),
        high=max(values),
        ci_low=low,
        ci_high=high,
    )
    return {name: round(value, 4) for name, value in told.items()}


def solved(values: Sequence[float]) -> str:
    """How many learned it, "4/5"."""
    return f"{sum(value >= LEARNED for value in values)}/{len(values)}"


def write(lines: Sequence[Mapping[str, Any]], file: pathlib.Path) -> None:
    """Writes a table as CSV."""
    columns = list(dict.fromkeys(key for line in lines for key in line))
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(lines)


def read(file: pathlib.Path) -> list[dict[str, str]]:
    """Reads it again; no lines where there is none."""
    if not file.exists():
        return []
    with open(file, encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))
