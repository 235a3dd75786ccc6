"""What a run gives back, and what the user reads at its end."""

import dataclasses
import os
import pathlib
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from seqzoo.train.folder import RunFolder, read_status
from seqzoo.train.setup import Setup

if TYPE_CHECKING:
    from seqzoo.train.session import Session


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The end of a run.

    Attributes:
        status: "finished", or "finished before" for one that had nothing to do.
        step: the last step.
        metric: the name of the metric that the run is judged by.
        value: the best value of it on the valid split.
        target: what it was to reach, or None.
        test: the metrics on the test split, of the best step.
        path: the run folder.
        seconds: from the call to here; 0 for one that was finished before.
        message: of a run that was finished before.
    """

    status: str
    step: int
    metric: str
    value: float | None
    target: float | None
    test: Mapping[str, float]
    path: pathlib.Path
    seconds: float = 0.0
    message: str = ""
    text: bool = False

    @classmethod
    def of(
        cls,
        run: Setup,
        folder: RunFolder,
        session: "Session",
        test: Mapping[str, float],
        seconds: float,
    ) -> "Result":
        return cls(
            status="finished",
            step=session.step,
            metric=run.task.metric,
            value=None if session.best is None else session.best.value,
            target=run.task.target,
            test=test,
            path=folder.path,
            seconds=seconds,
            text=run.data.bytes_per_token is not None,
        )

    def __str__(self) -> str:
        path = shlex.quote(os.path.relpath(self.path))
        if self.message:
            return f"{self.message}\n\n  {path}\n\n{self._next(path)}"
        lines = [f"trained {self.step} steps in {_duration(self.seconds)}"]
        if self.value is not None:
            lines.append(f"valid {self.metric} {self.value:.4g}{self._against_target()}")
        if self.metric in self.test:
            lines.append(f"test  {self.metric} {self.test[self.metric]:.4g}")
        return "\n".join(lines) + f"\n\n  {path}\n\n{self._next(path)}"

    def _against_target(self) -> str:
        return "" if self.target is None else f" (target {self.target:g})"

    def _next(self, path: str) -> str:
        commands = [
            f"seqzoo eval {path}",
            f"seqzoo report {path}",
            "seqzoo train trainer.seed=1",
        ]
        if self.text:
            commands.insert(1, f'seqzoo generate {path} --prompt "def "')
        return "next:\n" + "\n".join(f"  {command}" for command in commands)


def finished_before(folder: RunFolder) -> Result:
    """The result of a run that was finished when it was asked for."""
    status: Mapping[str, Any] = read_status(folder.path)
    metric = status.get("metric") or {}
    return Result(
        status="finished before",
        step=status.get("step", 0),
        metric=metric.get("name", ""),
        value=metric.get("value"),
        target=metric.get("target"),
        test=status.get("test") or {},
        path=folder.path,
        message=folder.finished() or "",
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
