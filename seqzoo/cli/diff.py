"""`seqzoo diff`: what differs between two runs: configuration, environment, metrics."""

import argparse
import pathlib
from collections.abc import Mapping
from typing import Any

from seqzoo.cli.common import cell, flat, print_json, print_table, run_path
from seqzoo.config.trust import read_plain
from seqzoo.train.run_files import read_json, read_metrics, read_status

EPILOG = """examples:
  seqzoo diff runs/mqar/latest runs/mqar/lr_3e-3-0123456789
  seqzoo diff RUN RUN --format json
  seqzoo diff RUN RUN --all            also what is equal

Environment is that of each run's last start. Metrics are the last value of each name.
"""

# Of a start's record: what is told apart at a glance, in this order.
_ENVIRONMENT = ("versions", "git", "devices", "threads", "python", "host", "variables", "code")
_ALWAYS_DIFFERENT = ("time", "pid", "command", "hash", "command_hash")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs=2, metavar="RUN", help="two run folders")
    parser.add_argument("--all", action="store_true", help="show what is equal as well")
    parser.add_argument("--format", choices=("table", "json"), default="table")


def run(args: argparse.Namespace) -> int:
    one, other = (read(run_path(name)) for name in args.runs)
    found = {part: compare(one[part], other[part], keep_equal=args.all) for part in one}
    if args.format == "json":
        print_json({part: {k: list(v) for k, v in rows.items()} for part, rows in found.items()})
        return 0
    print(f"A  {args.runs[0]}\nB  {args.runs[1]}")
    for part, rows in found.items():
        print(f"\n{part}: " + ("" if rows else "equal"))
        print_table([{"key": key, "A": show(a), "B": show(b)} for key, (a, b) in rows.items()])
    return 0


def read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns {configuration, environment, metrics} of a run as flat keys."""
    records = sorted((path / "env").glob("[0-9]*.json"))
    record = read_json(records[-1]) if records else {}
    environment = {key: record[key] for key in _ENVIRONMENT if key in record}
    environment |= {k: v for k, v in record.items() if k not in _ALWAYS_DIFFERENT}
    return {
        "configuration": dict(flat(read_plain(path / "config.yaml"))),
        "environment": dict(flat(environment)),
        "metrics": last_metrics(path),
    }


def last_metrics(path: pathlib.Path) -> dict[str, Any]:
    """The last value of each name in metrics.jsonl, and where the run stands."""
    status = read_status(path)
    found: dict[str, Any] = {"state": status.get("state"), "step": status.get("step")}
    for line in read_metrics(path):
        found.update({key: value for key, value in flat(line) if key != "step"})
    metric = status.get("metric") or {}
    if metric.get("name"):
        found[f"best {metric['name']}"] = metric.get("value")
    return found


def compare(
    one: Mapping[str, Any], other: Mapping[str, Any], *, keep_equal: bool = False
) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (value, value)} of what differs; MISSING where a side has no such key."""
    keys = dict.fromkeys([*one, *other])
    pairs = {key: (one.get(key, MISSING), other.get(key, MISSING)) for key in keys}
    return {key: pair for key, pair in pairs.items() if keep_equal or pair[0] != pair[1]}


MISSING = "-"


def show(value: Any) -> str:
    """One value in at most 60 characters."""
    text = "null" if value is None else cell(value)
    return text if len(text) <= 60 else text[:57] + "..."
