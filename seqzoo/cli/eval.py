"""`seqzoo eval`: the metrics of a run on its test split, or on other data."""

import argparse
from collections.abc import Mapping

from seqzoo.cli.common import (
    add_run_arguments,
    add_trust_argument,
    print_json,
    print_table,
    run_path,
)
from seqzoo.errors import ConfigError

EPILOG = """examples:
  seqzoo eval runs/mqar/latest
  seqzoo eval runs/mqar/latest data.seq_len=256 data.num_kv_pairs=16       longer rows
  seqzoo eval runs/text/latest data=text data.path=~/books --samples 1000
  seqzoo eval RUN --step last --split valid --format json

The best step is evaluated unless --step says otherwise. The model is what was trained; data and
task may be others. Slices of the data have rows of their own (accuracy/GROUP). What is printed is
also written to RUN/report/eval-SPLIT-OVERRIDES.json.
"""

SPLITS = ("test", "valid", "train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="other data or task"
    )
    parser.add_argument("--step", default="best", help="best, last, or a number (best)")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="N rows, spread evenly; of several lengths some of each",
    )
    parser.add_argument("--format", choices=("table", "json"), default="table")
    add_trust_argument(parser)


def run(args: argparse.Namespace) -> int:
    path = run_path(args.run)
    if args.samples is not None and args.samples < 1:
        raise ConfigError(f"--samples is {args.samples}; it must be at least 1")
    from seqzoo.eval.evaluate import evaluate_run  # starts jax
    from seqzoo.load import load
    from seqzoo.train import programs

    programs.use_disk_cache()
    loaded = load(path, args.step, args.trust)
    quiet = args.format == "json"
    found = evaluate_run(
        loaded,
        args.overrides,
        split=args.split,
        max_samples=args.samples,
        say=(lambda text: None) if quiet else print,
    )
    if quiet:
        print_json(found)
        return 0
    print(f"{args.run}, step {loaded.step}, {args.split} split of {found['data_fingerprint']}")
    print_metrics(found["metrics"])
    metric = loaded.config["task"].get("metric")
    note = not_learned(loaded, metric) if args.overrides else None
    if note:
        print(note)
    return 0


def print_metrics(metrics: Mapping[str, float]) -> None:
    """One row per metric, slices below their whole."""
    names = sorted(metrics, key=lambda name: (name.partition("/")[0] == "report", name))
    print_table([{"metric": name, "value": float(metrics[name])} for name in names])


def not_learned(loaded, metric: str | None) -> str | None:
    """What must be said of a figure on other data when the run's own was not learned."""
    from seqzoo.eval.compare import LEARNED, learned
    from seqzoo.train.run_files import read_status

    value = (read_status(loaded.path).get("metric") or {}).get("value")
    if value is None or learned(metric or "", value):
        return None
    return (
        f"not learned: on its own data the run reached {value:.4g} < {LEARNED}, so this measures "
        "neither capacity nor extrapolation"
    )
