"""What check_tpu and check_gpu share: the command line, a process per operator, the table.

Each operator is a process of its own: what kills a compiler ends one operator's check, and the
table says at which call. jax is started by those processes alone.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from pallas_kernels.core import kernel_table


@dataclasses.dataclass(frozen=True)
class Command:
    """One of the two commands.

    Attributes:
        module: that is run, "pallas_kernels.check_tpu".
        form: module of an operator's folder that makes it one of the command's.
        description: of --help.
        epilog: of --help.
        devices: names that --devices takes.
        quick: those without --full.
        whole: those with it.
        documents: those whose rows with documents come without --full too.
        row: the NamedTuple of the table; its first six fields are stack, operator, call, dtype,
            device and part.
        table: its path in a checkout.
        page: writes the page for people: of its path and the rows.
        line: a row for a terminal.
        goals: what compiles and misses a figure, a line each; it breaks nothing.
        wrong: what else is wrong with the rows beside the table's regressions, a line each.
    """

    module: str
    form: str
    description: str
    epilog: str
    devices: tuple[str, ...]
    quick: tuple[str, ...]
    whole: tuple[str, ...]
    documents: tuple[str, ...]
    row: Any
    table: pathlib.Path
    page: Callable[[pathlib.Path, list], None]
    line: Callable[[Any], str]
    goals: Callable[[list], list[str]]
    wrong: Callable[[list], list[str]] = lambda rows: []

    def chosen(self, args: argparse.Namespace) -> tuple[str, ...]:
        """The devices that are compiled for."""
        return args.devices or (self.whole if args.full else self.quick)


def parser(command: Command) -> argparse.ArgumentParser:
    one = argparse.ArgumentParser(
        prog=f"python -m {command.module}",
        description=command.description,
        epilog=command.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def devices(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in command.devices]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{unknown[0]} is none of {', '.join(command.devices)}"
            )
        return names

    usual, every = ",".join(command.quick), ", ".join(command.devices)
    one.add_argument("names", nargs="*", metavar="OPERATOR", help="all that have a kernel")
    one.add_argument("--full", action="store_true", help="every tagged call, on every device")
    one.add_argument("--devices", type=devices, metavar="A,B", help=f"of {every} ({usual})")
    one.add_argument("--check", action="store_true", help="compare with the committed table")
    one.add_argument("--write", action="store_true", help="put the figures into the table")
    one.add_argument("--table", type=pathlib.Path, default=command.table)
    one.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="N")
    one.add_argument("--worker", metavar="OPERATOR", help=argparse.SUPPRESS)
    return one


def operators(command: Command) -> list[str]:
    """The names of the operators, without importing jax."""
    folder = pathlib.Path(__file__).parent.parent
    return sorted(path.parent.name for path in folder.glob(f"*/{command.form}.py"))


def run(command: Command, args: argparse.Namespace) -> int:
    """Checks the operators that were named, reports, writes; gives the exit code."""
    names = args.names or operators(command)
    unknown = [name for name in names if name not in operators(command)]
    if unknown:
        print(f"there is no operator {unknown[0]}; there are {', '.join(operators(command))}")
        return 2
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        rows = pool.map(lambda name: _check(command, name, args), names)
        found = [row for some in rows for row in some]
    table = kernel_table.read(args.table, command.row)
    wrong = kernel_table.regressions(table, found) if args.check else failures(found)
    wrong = [*wrong, *command.wrong(found)]
    if args.check:
        wrong += kernel_table.vanished(table, found, asked(command, args, table, found))
    if args.check and (text := kernel_table.unknown_stack(table, found)):
        target = command.module.rpartition(".")[2].replace("_", "-")
        wrong.append(f"{text} (run make {target}-table)")
    if args.write:
        well = [row for row in found if not kernel_table.failed(row)]
        kept = kernel_table.merged(table, well, whole=args.full and not args.devices)
        kernel_table.write(args.table, kept, command.row)
        page = args.table.with_name("kernels.md")
        command.page(page, kept)
        print(f"wrote {args.table} and {page}")
    for text in command.goals(found):
        print(f"beside the goal: {text}")
    for text in wrong:
        print(f"WRONG: {text}")
    compiled = sum(map(kernel_table.compiles, found))
    seconds = time.perf_counter() - began
    told = f"{compiled} of {len(found)} programs compiled"
    if args.check:
        told += f", {kernel_table.compared(table, found)} rows compared with {args.table}"
    print(f"{told}, {len(wrong)} wrong, {seconds:.0f} s")
    return 1 if wrong else 0


def asked(
    command: Command, args: argparse.Namespace, table: list, found: list
) -> Callable[[Any], bool]:
    """Whether a row of the table is of what the command was to measure.

    Without --full these are the operators' first calls: those that rows were found of, and those
    that the table knows with documents, which no other call is compiled with.
    """
    packed = lambda row: row.part.startswith("documents")
    first = {(r.operator, r.call) for r in (*found, *filter(packed, table))}

    def one(row: Any) -> bool:
        if args.names and row.operator not in args.names:
            return False
        if row.device != "-" and row.device not in command.chosen(args):
            return False
        if args.full:
            return True
        if packed(row) and row.device not in command.documents:
            return False
        return (row.operator, row.call) in first

    return one


def failures(found: list) -> list[str]:
    """What neither compiles nor is refused."""
    return [f"{row.name}: {row.status}" for row in found if kernel_table.failed(row)]


def _check(command: Command, name: str, args: argparse.Namespace) -> list:
    """Runs an operator's worker; prints its rows as they come."""
    line = [sys.executable, "-m", command.module, "--worker", name]
    line += ["--full"] if args.full else []
    line += ["--devices", ",".join(args.devices)] if args.devices else []
    rows: list = []
    doing = "its start"
    with tempfile.TemporaryFile("w+") as noise:
        worker = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=noise, text=True)
        assert worker.stdout is not None
        for told in map(json.loads, worker.stdout):
            if "doing" in told:
                doing = told["doing"]
                continue
            rows.append(command.row(**told))
            print(command.line(rows[-1]), flush=True)
        if worker.wait() != 0:
            noise.seek(0)
            last = " ".join(noise.read().split())[-300:]
            text = f"the process ended with {worker.returncode} at {doing}: {last}"
            rows.append(command.row("", name, "-", "", "-", "-", status=text))
            print(command.line(rows[-1]), flush=True)
    return rows


def work(args: argparse.Namespace, check: Callable[[Any, pathlib.Path], Iterator[Any]]) -> int:
    """One operator, in a process of its own; prints rows as JSON.

    Args:
        args: of the command line.
        check: gives rows of an operator, and texts of what it does next; its second argument is an
            empty folder for what compilers dump.
    """
    with tempfile.TemporaryDirectory() as folder:
        from pallas_kernels import OPERATORS

        for told in check(OPERATORS[args.worker], pathlib.Path(folder)):
            line = {"doing": told} if isinstance(told, str) else told._asdict()
            print(json.dumps(line), flush=True)
    return 0
