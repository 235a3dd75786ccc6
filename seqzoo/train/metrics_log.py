"""metrics.jsonl: only what the run determines, so that equal runs have equal files."""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Totals = dict[str, tuple[float, float]]


class MetricsLog:
    """Adds up what updates tell, and writes a line every `every` steps.

    A line holds the means over the steps since the line before, each answer counting the same.
    What was added up since then is the `memory` of a checkpoint: going on from any step gives the
    same lines.

    Args:
        path: the file; None = this process writes nothing.
        every: steps per line.
        finish: from totals {name: (sum, weight)} to values, as a task has it.
    """

    def __init__(
        self,
        path: pathlib.Path | None,
        *,
        every: int,
        finish: Callable[[Mapping[str, tuple[float, float]]], dict[str, float]],
    ):
        self._file = None if path is None else path.open("ab")
        self._every = every
        self._finish = finish
        self._totals: Totals = {}

    def add(self, step: int, totals: Totals, **more: float) -> dict[str, float] | None:
        """Adds one update; returns the values of the line that it completes, if it does.

        Args:
            step: updates done.
            totals: sums and weights of this update.
            **more: values of this step for the line, such as the learning rate.
        """
        add(self._totals, totals)
        if step % self._every:
            return None
        values = self._finish(self._totals) | more
        self._totals = {}
        self.write(step, "train", values)
        return values

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes one line: ``{"step": 10, "train/loss": 0.5}``."""
        line = {"step": step} | {f"{split}/{name}": _number(v) for name, v in values.items()}
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()  # a kill loses nothing that was written

    def n_bytes(self) -> int:
        """The length of the file, once it is on disk."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    @property
    def memory(self) -> list[tuple[str, float, float]]:
        """What was added up since the last line, in order: JSON objects come back sorted."""
        return [(name, *pair) for name, pair in self._totals.items()]

    def remember(self, memory: Iterable[tuple[str, float, float]]) -> None:
        """Goes on from a memory."""
        self._totals = {name: (value, weight) for name, value, weight in memory}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def add(totals: Totals, more: Mapping[str, tuple[Any, Any]]) -> None:
    """Adds sums and weights in float64: over many batches float32 would lose the last digits."""
    for name, (value, weight) in more.items():
        before = totals.get(name, (0.0, 0.0))
        totals[name] = (before[0] + float(value), before[1] + float(weight))


def _number(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
