"""The trials of a study as they are shown."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from seqzoo.sweep import locks
from seqzoo.sweep.definition import Definition

_STATES = {
    TrialState.WAITING: "waiting",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A trial as it is shown.

    Attributes:
        number: of the trial.
        state: waiting, running, interrupted, finished, diverged, pruned or failed.
        point: what was chosen; empty where that is still to come.
        value: its metric: the median over its seeds, of each the best on the valid split.
        last: the newest (step, value) of its first seed.
        attrs: what its worker wrote: runs, values, tests, architecture, size, seconds, failure.
    """

    number: int
    state: str
    point: Mapping[str, Any]
    value: float | None
    last: tuple[int, float] | None
    attrs: Mapping[str, Any]

    @property
    def done(self) -> bool:
        return self.state in ("finished", "diverged", "pruned")


def row_of(path: pathlib.Path, definition: Definition, frozen: FrozenTrial) -> Row:
    """One of Optuna's trials as it is shown; path and definition of its study."""
    attrs, value = frozen.user_attrs, frozen.value
    state = _STATES.get(frozen.state)
    if state == "finished" and value == definition.worst:
        state = "diverged"
    if state is None:
        elsewhere = attrs.get("place") not in (None, definition.place)  # we do not see it
        alive = elsewhere or locks.alive(path, frozen.number)
        state = "failed" if attrs.get("failure") else "running" if alive else "interrupted"
    point = frozen.params or frozen.system_attrs.get("fixed_params", {})
    told = frozen.intermediate_values
    last = None if not told else (max(told), told[max(told)])
    return Row(frozen.number, state, point, value, last, attrs)
