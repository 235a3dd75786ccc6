"""What the user sees while a run trains: a bar on a terminal, now and then a line elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Any

from seqzoo.train.hooks.hook import Hook, Values

_SECONDS_PER_LINE = 10.0


class Progress(Hook):
    """Prints, and keeps what was printed in train.log.

    Args:
        kind: auto (a bar on a terminal, else lines), bar, lines or none.
        steps: of the whole run.
        metric: name of the metric that the run is judged by.
        log: gets every line for train.log.
    """

    name = "progress"

    def __init__(self, kind: str, *, steps: int, metric: str, log: Callable[[str], None]):
        self._steps, self._metric, self._log = steps, metric, log
        if kind == "auto":
            kind = "bar" if sys.stdout.isatty() else "lines"
        self._kind = kind
        self._bar: Any = None
        self._last_line = -_SECONDS_PER_LINE
        self._step_seconds: float | None = None

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._log(text)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._kind != "none":
            print(text, flush=True)

    def start(self, step: int) -> None:
        if self._kind == "bar":
            self._bar = _make_bar()
            self._task = self._bar.add_task("train", total=self._steps, completed=step, told="")
            self._bar.start()

    def line(self, step: int, values: Values, timing: Values) -> None:
        told = self._told(values, timing)
        before, now = self._step_seconds, timing["step_seconds"]
        self._step_seconds = now if before is None else 0.8 * before + 0.2 * now
        if self._bar is not None:
            self._bar.update(self._task, completed=step, told=told)
        elif time.monotonic() - self._last_line >= _SECONDS_PER_LINE:
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self._steps}  {told}  ETA {self._eta(step)}")

    def evaluated(self, step: int, split: str, values: Values) -> None:
        told = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if not k.startswith("report/"))
        self.say(f"step {step}  {split}: {told}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _told(self, values: Values, timing: Values) -> str:
        names = dict.fromkeys(["loss", self._metric, "accuracy"])
        words = [f"{name} {values[name]:.4g}" for name in names if name in values]
        words.append(f"{timing['tokens_per_second']:,.0f} tokens/s")
        if timing["data_wait"] >= 0.05:
            words.append(f"waits for data {timing['data_wait']:.0%}")
        return "  ".join(words)

    def _eta(self, step: int) -> str:
        assert self._step_seconds is not None
        minutes, seconds = divmod(round(self._step_seconds * (self._steps - step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _make_bar() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        refresh_per_second=4,
    )
