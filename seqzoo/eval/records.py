"""Run folders as they are read for tables and plots. Imports no jax and builds nothing."""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from seqzoo.config.trust import read_plain
from seqzoo.train.run_files import read_json, read_metrics, read_status

Series = tuple[list[int], list[float]]


@dataclasses.dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        path: its folder.
        label: what tells it from the others in a table.
        config: the resolved configuration, as data.
        status: status.json.
        starts: env/NNN.json, one per start.
        metrics: lines of metrics.jsonl.
        timing: lines of timing.jsonl.
        evaluations: report/eval-*.json by name.
    """

    path: pathlib.Path
    label: str
    config: Mapping[str, Any]
    status: Mapping[str, Any]
    starts: Sequence[Mapping[str, Any]]
    metrics: Sequence[Mapping[str, Any]]
    timing: Sequence[Mapping[str, Any]]
    evaluations: Mapping[str, Mapping[str, Any]]

    @property
    def last_start(self) -> Mapping[str, Any]:
        return self.starts[-1] if self.starts else {}

    @property
    def fingerprint(self) -> str | None:
        """Of the data, as it was at the first start."""
        return self.starts[0].get("data_fingerprint") if self.starts else None

    @property
    def metric(self) -> Mapping[str, Any]:
        """{name, value, target}: the best value on the valid split."""
        return self.status.get("metric") or {}

    @property
    def tested(self) -> Mapping[str, float]:
        """Metrics of the best step on the test split, from the end of the run."""
        return self.status.get("test") or {}

    @property
    def seed(self) -> Any:
        return (self.config.get("trainer") or {}).get("seed")

    @property
    def diverged(self) -> bool:
        return self.status.get("state") == "not_finite"

    @property
    def tokens(self) -> int | None:
        """Tokens that training has read; None = not known."""
        if "tokens" in self.status:
            return self.status["tokens"]
        # Not counted, in runs of before: known where rows have one length, which the data names.
        trainer, data = self.config.get("trainer") or {}, self.config.get("data") or {}
        if not isinstance(data.get("seq_len"), int):
            return None
        rows = (self.status.get("step") or 0) * (trainer.get("global_batch_size") or 0)
        return rows * data["seq_len"]


def read(path: pathlib.Path, label: str | None = None) -> Record:
    """Reads a run folder."""
    evaluations = sorted((path / "report").glob("eval-*.json"))
    return Record(
        path=path,
        label=path.name if label is None else label,
        config=read_plain(path / "config.yaml"),
        status=read_status(path),
        starts=[read_json(file) for file in sorted((path / "env").glob("[0-9]*.json"))],
        metrics=read_metrics(path),
        timing=read_lines(path / "timing.jsonl"),
        evaluations={file.stem.removeprefix("eval-"): read_json(file) for file in evaluations},
    )


def read_all(paths: Iterable[pathlib.Path]) -> list[Record]:
    """Reads run folders and labels them by what their paths do not share."""
    paths = list(dict.fromkeys(paths))
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.parent.name}/{path.name}" for path in paths]
    if len(set(names)) < len(names):
        names = list(map(str, paths))
    return [read(path, label) for path, label in zip(paths, names, strict=True)]


def finished(names: Iterable[str]) -> list[Record]:
    """Reads the finished runs of what `runs/mqar/*` names, each once; says what it leaves out."""
    records = []
    for path in dict.fromkeys(pathlib.Path(name).resolve() for name in names):
        if not (path / "config.yaml").is_file():
            if path.name != "report":  # that of several runs lies beside them
                print(f"left out: {path} is no run folder", file=sys.stderr)
            continue
        record = read(path)
        if record.status.get("state") == "finished":
            records.append(record)
        else:
            print(f"left out: {path} is not finished", file=sys.stderr)
    return records


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a JSONL file; none where there is no file."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    found = []
    for line in lines:
        try:
            content = json.loads(line)
        except ValueError:  # a line that a kill cut, with others after it
            continue
        if isinstance(content, dict):
            found.append(content)
    return found


def series(lines: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """Numbers by name over steps; names of nested values are joined with a slash."""
    found: dict[str, Series] = {}
    for line in lines:
        step = line.get("step")
        if not isinstance(step, int):
            continue
        for name, value in _numbers(line, ""):
            if name != "step":
                steps, values = found.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return found


def _numbers(line: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, float]]:
    for key, value in line.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _numbers(value, name + "/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)
        elif value in ("NaN", "Infinity", "-Infinity"):  # as JSON has no such numbers
            yield name, math.nan if value == "NaN" else float(value.replace("Infinity", "inf"))
