"""`seqzoo runs`: the runs here, newest last."""

import argparse
import pathlib
import time
from typing import Any

from seqzoo.cli.common import print_json, print_table
from seqzoo.errors import ConfigError, suggest
from seqzoo.train.run_files import find_runs, read_json, read_status

EPILOG = """examples:
  seqzoo runs                          every run under runs/
  seqzoo runs mqar                     those of one experiment
  seqzoo runs --state finished --format json

A run that says "running" while no process holds it was killed: it is shown as "interrupted", and
the command that started it goes on with it.
"""

STATES = ("running", "finished", "preempted", "interrupted", "not_finite", "pruned", "failed")
_STALE_SECONDS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "experiment", nargs="*", default=[], metavar="EXPERIMENT", help="only these"
    )
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where runs lie (runs)")
    parser.add_argument("--state", choices=STATES, help="only runs in this state")
    parser.add_argument("--format", choices=("table", "json"), default="table")


def run(args: argparse.Namespace) -> int:
    root = pathlib.Path(args.runs)
    if not root.is_dir():
        raise ConfigError(f"{root}: there is no such folder; 'seqzoo train' makes it")
    rows = [row(path, root) for path in find_runs(root)]
    there = sorted({one["run"].split("/")[0] for one in rows})
    for name in args.experiment:
        if name not in there:
            raise ConfigError(
                f"{root} holds no runs of '{name}'{suggest(name, there)}; there are "
                f"{', '.join(there) or 'none'}"
            )
    rows = [
        one
        for one in rows
        if (not args.experiment or one["run"].split("/")[0] in args.experiment)
        and args.state in (None, one["state"])
    ]
    if args.format == "json":
        print_json(rows)
    elif not rows:
        print(f"no run under {root} fits")
    else:
        print_table([{**one, "age": age_text(one["age"])} for one in rows])
    return 0


def row(path: pathlib.Path, root: pathlib.Path) -> dict[str, Any]:
    """What is shown of one run; age in seconds since its status was written."""
    status = read_status(path)
    metric = status.get("metric") or {}
    return {
        "run": str(path.relative_to(root)),
        "state": state_of(path, status),
        "step": status.get("step"),
        "metric": metric.get("name"),
        "value": metric.get("value"),
        "target": metric.get("target"),
        "age": round(time.time() - (path / "status.json").stat().st_mtime),
    }


def state_of(path: pathlib.Path, status: dict[str, Any]) -> str:
    """The state in status.json, unless it says running and no living process holds the folder."""
    state = str(status.get("state", "unknown"))
    lock = path / ".lock"
    if state != "running":
        return state
    holder = read_json(lock) if lock.exists() else {}
    # The holder moves its beat every few seconds, on whatever host it runs.
    alive = bool(holder) and time.time() - lock.stat().st_mtime < _STALE_SECONDS
    return "running" if alive else "interrupted"


def age_text(seconds: float) -> str:
    """``3 min``, ``5 h``, ``2 d``."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
