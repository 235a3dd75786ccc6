"""`seqzoo report`: plots and tables of runs."""

import argparse
import contextlib
import os
import pathlib
from collections.abc import Iterator

from seqzoo.cli.common import (
    add_run_arguments,
    add_trust_argument,
    print_json,
    print_table,
    run_path,
)
from seqzoo.errors import SeqzooError

# What makes a folder a study, and where studies lie; see seqzoo.sweep, which is slow to import.
STUDY_FILE = "study.json"
STUDIES = pathlib.Path("runs/sweeps")

EPILOG = """examples:
  seqzoo report runs/mqar/latest                     curves of one run, in its report/ folder
  seqzoo report runs/mqar/*                          a table that ranks runs, and their curves
  seqzoo report runs/sweeps/rates                    a sweep: best per architecture, curves, ...
  seqzoo report rates                                the same, by its name
  seqzoo report RUN RUN --out /tmp/compared --format json

index.html opens without a network; the PNG and CSV files beside it are what it shows. Runs that
saw different data do not share a table. Runs that differ in their seeds alone are one row.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, many=True)
    parser.add_argument(
        "--out", metavar="DIR", help="where to write (RUN/report, or report/ above several runs)"
    )
    parser.add_argument("--format", choices=("table", "json"), default="table")
    add_trust_argument(parser)


def run(args: argparse.Namespace) -> int:
    study = _study(args.runs[0]) if len(args.runs) == 1 else None
    if study is not None:
        return _sweep(study, args)
    names = args.runs if len(args.runs) == 1 else [n for n in args.runs if not _aside(n)]
    runs = list(dict.fromkeys(map(run_path, names)))
    from seqzoo.eval.report import table, write_comparison, write_report  # starts jax

    if len(runs) == 1:
        with _written():
            page = write_report(runs[0], folder=args.out, trust=args.trust)
        if args.format == "json":
            print_json({"page": str(page)})
        else:
            for file in (page, *sorted(page.parent.glob("*.png")), page.with_name("metrics.csv")):
                print(file)
        return 0
    above = pathlib.Path(os.path.commonpath(runs))
    with _written():
        page, found = write_comparison(runs, args.out or above / "report", trust=args.trust)
    rows = table(found)
    if args.format == "json":
        print_json(
            {"page": str(page), "rows": rows, "matched": found.matched, "remarks": found.remarks}
        )
        return 0
    value = f"{found.metric} ({found.split})"
    shown = ("place", "run", "runs", value, "min - max", "95 %", "solved", "diverged", "lr")
    costs = ("without embeddings", "state bytes, recurrent", "state bytes, all")
    print_table([{key: row.get(key) for key in (*shown, *costs)} for row in rows])
    if len(rows) > 1:
        print(f"matched on {' and '.join(found.matched) or 'nothing'}")
    for remark in found.remarks:
        print(remark)
    print(page)
    return 0


def _study(name: str) -> pathlib.Path | None:
    """The folder of a study, by its path or its name; None = it is none."""
    for path in (pathlib.Path(name), STUDIES / name):
        if (path / STUDY_FILE).is_file():
            return path
    return None


def _sweep(path: pathlib.Path, args: argparse.Namespace) -> int:
    """The report of a study; starts no jax."""
    from seqzoo.sweep.report import write_sweep_report
    from seqzoo.sweep.results import best_rows, remarks, results
    from seqzoo.sweep.study import Study

    study = Study.open(path)
    found = results(study)
    folder = pathlib.Path(args.out) if args.out else study.path / "report"
    with _written():
        page = write_sweep_report(found, folder)
    rows, told = best_rows(found), remarks(found)
    if args.format == "json":
        print_json({"page": str(page), "rows": rows, "remarks": told})
        return 0
    print_table(rows)
    for remark in told:
        print(remark)
    print(page)
    return 0


def _aside(name: str) -> bool:
    """`runs/mqar/*` also names the reports of earlier calls, and a link whose run is gone."""
    path = pathlib.Path(name)
    return path.name == "report" or (path.is_symlink() and not path.exists())


@contextlib.contextmanager
def _written() -> Iterator[None]:
    """Says where else to write what cannot be written."""
    try:
        yield
    except OSError as error:
        raise SeqzooError(
            f"the report cannot be written: {error}; --out DIR writes it elsewhere"
        ) from error
