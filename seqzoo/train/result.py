"""What a run gives back, and what the user reads at its end."""

import dataclasses
import os
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from seqzoo.train import branch as branches
from seqzoo.train.folder import RunFolder
from seqzoo.train.run_files import read_status
from seqzoo.train.session import Session
from seqzoo.train.setup import Setup


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
        next: commands to try.
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
    next: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        run: Setup,
        folder: RunFolder,
        session: Session,
        test: Mapping[str, float],
        seconds: float,
        overrides: Sequence[str] = (),
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
            next=_next(folder.path, overrides, run.config, run.data.bytes_per_token is not None),
        )

    def __str__(self) -> str:
        first = f"trained to step {self.step} in {_duration(self.seconds)}"
        lines = [self.message or first]
        if self.value is not None:
            lines.append(f"valid {self.metric} {self.value:.4g}{self._against_target()}")
        if self.metric in self.test:
            lines.append(f"test  {self.metric} {self.test[self.metric]:.4g}")
        lines += ["", f"  {_quoted(self.path)}"]
        if self.next:
            lines += ["", "next:", *(f"  {command}" for command in self.next)]
        return "\n".join(lines)

    def _against_target(self) -> str:
        return "" if self.target is None else f" (target {self.target:g})"


def _next(
    path: pathlib.Path, overrides: Sequence[str], config: Mapping[str, Any], text: bool
) -> tuple[str, ...]:
    """What one may want to do with a run of these words."""
    shown = _quoted(path)
    kept = [word for word in overrides if not word.lstrip("+").startswith("trainer.seed=")]
    another = shlex.join([*kept, f"trainer.seed={config['trainer']['seed'] + 1}"])
    generate = [f'seqzoo generate {shown} --prompt "def "'] if text else []
    return (f"seqzoo eval {shown}", *generate, f"seqzoo train {another}")


def _quoted(path: pathlib.Path) -> str:
    return shlex.quote(os.path.relpath(path))


def finished_before(folder: RunFolder, config: Mapping[str, Any]) -> Result:
    """The result of a run that was finished when it was asked for with this configuration."""
    status: Mapping[str, Any] = read_status(folder.path)
    noticed = [*folder.noticed(config), *branches.moved(folder, config)]
    metric = status.get("metric") or {}
    return Result(
        status="finished before",
        step=status.get("step", 0),
        metric=metric.get("name", ""),
        value=metric.get("value"),
        target=metric.get("target"),
        test=status.get("test") or {},
        path=folder.path,
        message="\n".join([folder.finished() or "", *(f"warning: {text}" for text in noticed)]),
        next=(f"seqzoo eval {_quoted(folder.path)}",),
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
