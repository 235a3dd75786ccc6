"""`python -m pallas_kernels.check_tpu`: compiles every kernel for TPUs that need not be there.

Each operator is a process of its own: what kills a compiler ends one operator's check, and the
table says at which call. Exit codes: 0 all is well, 1 something does not compile or got worse than
the committed table, 2 a bad argument, 3 libtpu is not installed.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from pallas_kernels.core import kernel_report, kernel_table
from pallas_kernels.core.kernel_table import Row

EPILOG = """examples:
  python -m pallas_kernels.check_tpu                         one call per operator, v5e and TPU7x
  python -m pallas_kernels.check_tpu --full                  every call, v5e, v5p, v6e and TPU7x
  python -m pallas_kernels.check_tpu selective_scan gla --full --devices v5e
  python -m pallas_kernels.check_tpu --check                 breaks where a figure got worse
  python -m pallas_kernels.check_tpu --full --write          writes docs/kernels.csv and kernels.md

libtpu must be importable, and need not be in the environment: `make check-tpu` keeps it in build/
and puts it on PYTHONPATH for this command alone. Nothing is run on a device, so nothing here is a
speed: docs/kernels.md says what each column is.
"""

DEVICES = ("v5e", "v5p", "v6e", "tpu7x")
QUICK_DEVICES = ("v5e", "tpu7x")


def main(arguments: list[str] | None = None) -> int:
    """Parses, runs, reports; gives the exit code."""
    args = parser().parse_args(arguments)
    if importlib.util.find_spec("libtpu") is None:
        print(
            "check-tpu: libtpu is not installed, so NO KERNEL WAS COMPILED FOR A TPU. "
            "`make check-tpu` installs it into build/.",
            file=sys.stderr,
        )
        return 3
    if args.worker:
        return work(args)
    # Only names: jax is started by the workers alone.
    names = args.names or operators()
    unknown = [name for name in names if name not in operators()]
    if unknown:
        print(f"there is no operator {unknown[0]}; there are {', '.join(operators())}")
        return 2
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        found = [row for rows in pool.map(lambda n: check(n, args), names) for row in rows]
    table = kernel_table.read(args.table)
    wrong = kernel_table.regressions(table, found) if args.check else failures(found)
    if args.write:
        well = [row for row in found if not kernel_table.failed(row)]
        kept = kernel_table.merged(table, well, whole=args.full and not args.devices)
        kernel_table.write(args.table, kept)
        kernel_report.write(args.table.with_suffix(".md"), kept)
        print(f"wrote {args.table} and {args.table.with_suffix('.md')}")
    for text in kernel_report.beside_the_goals(found):
        print(f"beside the goal: {text}")
    for text in wrong:
        print(f"WRONG: {text}")
    compiled = sum(row.status == "compiled" for row in found)
    seconds = time.perf_counter() - began
    print(f"{compiled} of {len(found)} programs compiled, {len(wrong)} wrong, {seconds:.0f} s")
    return 1 if wrong else 0


def parser() -> argparse.ArgumentParser:
    one = argparse.ArgumentParser(
        prog="python -m pallas_kernels.check_tpu",
        description="Compiles the TPU kernels at the shapes of real models, without a TPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("names", nargs="*", metavar="OPERATOR", help="all that have a kernel")
    one.add_argument("--full", action="store_true", help="every tagged call, on every device")
    one.add_argument(
        "--devices", type=devices, metavar="A,B", help=f"of {', '.join(DEVICES)} (v5e,tpu7x)"
    )
    one.add_argument("--check", action="store_true", help="compare with the committed table")
    one.add_argument("--write", action="store_true", help="put the figures into the table")
    one.add_argument("--table", type=pathlib.Path, default=pathlib.Path(kernel_table.PATH))
    one.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="N")
    one.add_argument("--worker", metavar="OPERATOR", help=argparse.SUPPRESS)
    return one


def devices(text: str) -> tuple[str, ...]:
    """Generations from a list with commas."""
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in DEVICES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(DEVICES)}")
    return names


def operators() -> list[str]:
    """The names of the operators, without importing jax."""
    folder = pathlib.Path(__file__).parent
    return sorted(path.parent.name for path in folder.glob("*/pallas_tpu.py"))


def check(name: str, args: argparse.Namespace) -> list[Row]:
    """Runs an operator's worker; prints its rows as they come."""
    command = [sys.executable, "-m", "pallas_kernels.check_tpu", "--worker", name]
    command += ["--full"] if args.full else []
    command += ["--devices", ",".join(args.devices)] if args.devices else []
    rows: list[Row] = []
    doing = "its start"
    with tempfile.TemporaryFile("w+") as noise:
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=noise, text=True)
        assert worker.stdout is not None
        for line in worker.stdout:
            told = json.loads(line)
            if "doing" in told:
                doing = told["doing"]
                continue
            rows.append(Row(**told))
            print(kernel_report.line(rows[-1]), flush=True)
        if worker.wait() != 0:
            noise.seek(0)
            last = " ".join(noise.read().split())[-300:]
            text = f"the process ended with {worker.returncode} at {doing}: {last}"
            rows.append(Row("", name, "-", "", "-", "-", status=text))
            print(kernel_report.line(rows[-1]), flush=True)
    return rows


def work(args: argparse.Namespace) -> int:
    """One operator, in a process of its own; prints rows as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        dumps = pathlib.Path(folder)
        from pallas_kernels.core import aot  # what libtpu reads must be set before it is loaded

        aot.prepare(dumps)
        from pallas_kernels import OPERATORS
        from pallas_kernels.core import kernel_check

        op: Any = OPERATORS[args.worker]
        if not kernel_check.has_kernel(op):
            return 0
        stack = aot.stack()
        specs = kernel_check.specs_of(op, primary=not args.full)
        if not specs:
            text = "it has a kernel, and arg_specs.py has no call tagged 'tpu' and 'primary'"
            print(json.dumps(Row(stack, op.__name__, "-", "", "-", "-", text)._asdict()))
        for spec in specs:
            for name in args.devices or (DEVICES if args.full else QUICK_DEVICES):
                print(json.dumps({"doing": f"{spec.name} on {name}"}), flush=True)
                rows = kernel_check.check(
                    op,
                    spec,
                    aot.tpu_device(name),
                    stack=stack,
                    # The quick check asks only what can get worse; the portable form is slow
                    # to compile.
                    xla=name == "v5e" and args.full,
                    documents="primary" in spec.tags and (name == "v5e" or args.full),
                    dumps=dumps,
                )
                for row in rows:
                    print(json.dumps(row._asdict()), flush=True)
    return 0


def failures(found: list[Row]) -> list[str]:
    """What neither compiles nor is refused."""
    return [f"{row.name}: {row.status}" for row in found if kernel_table.failed(row)]


if __name__ == "__main__":
    sys.exit(main())
