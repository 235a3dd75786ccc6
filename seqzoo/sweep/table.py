"""What the user sees of a study: a table that lives on a terminal, lines elsewhere."""

import collections
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from seqzoo.sweep.rows import Row
from seqzoo.sweep.storage import AWAY, StorageError
from seqzoo.sweep.study import Study
from seqzoo.train.run_files import read_status

_STATES = ("running", "interrupted", "waiting", "finished", "pruned", "diverged", "failed")
_COLOURS = {
    "running": "cyan",
    "interrupted": "yellow",
    "finished": "green",
    "pruned": "magenta",
    "diverged": "red",
    "failed": "red",
}
_DRAW_SECONDS = 2.0
_LINE_SECONDS = 10.0
_MOST_ROWS = 24


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many trials are in each state."""
    found = collections.Counter(row.state for row in rows)
    return {state: found[state] for state in _STATES if found[state]}


def best(study: Study, rows: Sequence[Row]) -> Row | None:
    """The best trial that ended."""
    found = None
    for row in rows:
        if row.state == "finished" and (
            found is None or better(study.definition.mode, row.value, found.value)
        ):
            found = row
    return found


def line(study: Study, rows: Sequence[Row]) -> str:
    """``24 trials: 3 running, 21 finished; best 0.98 (trial 7)``."""
    told = ", ".join(f"{count} {state}" for state, count in counts(rows).items())
    text = f"{study.definition.name}: {len(rows)} trials: {told}"
    top = best(study, rows)
    if top is not None:
        text += f"; best {study.definition.metric} {top.value:.4g} (trial {top.number})"
    return text


def as_dicts(study: Study, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The trials as one prints or exports them."""
    return [
        {
            "trial": row.number,
            "state": row.state,
            "step": _step(study, row),
            study.definition.metric: _value(row),
            **row.point,
            "starts": row.attrs.get("starts"),
            "failure": row.attrs.get("failure") or None,
        }
        for row in rows
    ]


def failures(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table at the end, of what failed."""
    return [
        {"trial": row.number, "failure": row.attrs.get("failure"), **row.point}
        for row in rows
        if row.state == "failed"
    ]


class LiveTable:
    """Draws a study again and again; use it in `with`, and call `draw` often.

    Args:
        study: what is drawn.
        console: where; None = standard output.
    """

    def __init__(self, study: Study, console: Console | None = None):
        self._study = study
        self._console = console or Console()
        self._live: Live | None = None
        self._drawn = 0.0
        self._last: Mapping[str, int] = {}

    def __enter__(self) -> "LiveTable":
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self.draw(now=True)
            self._live.stop()

    def say(self, text: str) -> None:
        """Prints a line, above the table where there is one."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def draw(self, *, now: bool = False) -> None:
        """Draws, if it is time for it; a storage that is away leaves what was drawn."""
        pause = _DRAW_SECONDS if self._live is not None else _LINE_SECONDS
        if not now and time.monotonic() - self._drawn < pause:
            return
        self._drawn = time.monotonic()
        try:
            self._study.optuna.get_trials(deepcopy=False)  # without patience: it only draws
            rows = self._study.rows()
        except (*AWAY, StorageError):
            return
        if self._live is not None:
            self._live.update(self._picture(rows), refresh=True)
        elif counts(rows) != self._last:
            self._last = counts(rows)
            print(line(self._study, rows), flush=True)

    def _picture(self, rows: Sequence[Row]) -> Group:
        told = self._study.definition
        names = list(dict.fromkeys(name for row in rows for name in row.point))
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("trial", "state", "step", told.metric, *names):
            table.add_column(name.rpartition(".")[2], overflow="fold")
        for row in _chosen(told.mode, rows):
            state = Text(row.state, style=_COLOURS.get(row.state, "dim"))
            cells = (_short(row.point.get(name)) for name in names)
            value, step = _short(_value(row)), _short(_step(self._study, row))
            table.add_row(str(row.number), state, step, value, *cells)
        return Group(table, Text(line(self._study, rows)))


def _chosen(mode: str, rows: Sequence[Row]) -> list[Row]:
    """What fits on a screen: what runs or went wrong, then the best."""
    first = [row for row in rows if row.state in ("running", "interrupted", "failed")]
    sign = -1 if mode == "max" else 1
    ended = [row for row in rows if row.done and row.value is not None]
    ended.sort(key=lambda row: (row.state != "finished", sign * row.value))
    return [*first, *ended][:_MOST_ROWS]


def _value(row: Row) -> float | None:
    value = row.value if row.done else (row.last[1] if row.last else None)
    return None if value is None or not math.isfinite(value) else value


def _step(study: Study, row: Row) -> int | None:
    """How far its newest run is."""
    if row.state in ("running", "interrupted", "failed"):
        for name in reversed(row.attrs.get("runs") or []):
            step = read_status(study.path / name).get("step")
            if step is not None:
                return step
    return row.last[0] if row.last else None


def _short(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def better(mode: str, one: float, other: float) -> bool:
    """Whether a value is better than another; what is no number never is."""
    if math.isnan(one) or math.isnan(other):
        return not math.isnan(one)
    return one > other if mode == "max" else one < other
