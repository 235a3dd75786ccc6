"""`python -m pallas_kernels.gpu_report`: on a GPU, are the kernels right, and how fast are they.

Exit codes: 0 every kernel is right, 1 one is not (or has none, crashed, took too long), 2 a bad
argument, 3 there is no GPU that the kernels are for.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile

from pallas_kernels.core import gpu_table, kernel_command
from pallas_kernels.core.on_gpu import page, result
from pallas_kernels.core.on_gpu.result import Result
from pallas_kernels.core.on_gpu.work import (
    LONGER,
    PHASES,
    SHARES,
    USUAL,
    names_of,
    operator_of,
    work,
)

EPILOG = """examples:
  python -m pallas_kernels.gpu_report                   everything, under 8 minutes, into docs/gpu/
  python -m pallas_kernels.gpu_report --only numerics   are they right
  python -m pallas_kernels.gpu_report selective_scan --only numerics,rates,times
  python -m pallas_kernels.gpu_report --peers wheels/   fla-core and einops, wheels or a folder
  python -m pallas_kernels.gpu_report --only models     tokens per second of whole models
  python -m pallas_kernels.gpu_report --dry-run         on a CPU, tiny: does the report work
  make gpu-report PYTHON=python3 ARGS="--peers wheels/"

Needs jax 0.11 with CUDA, numpy and this checkout; no network. PyTorch, Triton and fla-core are
taken where they are there, and a line says so where they are not. Whole models (some minutes more)
need what seqzoo needs; --peers may hold that too. With --only, or operators, the findings of an
earlier report about the others stay. Every operator is a process of
its own with a time limit: one that hangs or crashes costs its rows. The page, the table and the
plots are written anew with every finding.
"""
COMMAND = kernel_command.Command(
    module="pallas_kernels.gpu_report",
    form="pallas_gpu",
    description="",
    epilog=EPILOG,
    devices=(),
    quick=(),
    whole=(),
    documents=(),
    row=Result,
    table=pathlib.Path("docs/gpu"),
    page=lambda path, rows: None,
    line=result.line,
    goals=lambda rows: [],
)


def main(arguments: list[str] | None = None) -> int:
    """Parses, runs every process, writes as they find; gives the exit code."""
    args = parser().parse_args(arguments)
    if args.worker:
        name = args.names[0] if args.names else ""
        return work(args.worker, name, seed=args.seed, dry=args.dry_run, folder=args.folder)
    known = kernel_command.operators(COMMAND)
    unknown = [name for name in args.names if name not in known]
    if unknown:
        print(f"there is no operator {unknown[0]}; there are {', '.join(known)}")
        return 2
    return Report(args, args.names or known).run()


def parser() -> argparse.ArgumentParser:
    def phases(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        unknown = [name for name in names if name not in PHASES]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(PHASES)}")
        return names

    one = argparse.ArgumentParser(
        prog="python -m pallas_kernels.gpu_report",
        description="Runs the GPU kernels on the GPU at hand: numerics first, then times.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("names", nargs="*", metavar="OPERATOR", help="all")
    one.add_argument("--only", type=phases, metavar="A,B", help=f"of {', '.join(PHASES)}")
    one.add_argument("--dry-run", action="store_true", help="on a CPU, tiny, by interpretation")
    one.add_argument("--output", type=pathlib.Path, metavar="FOLDER", help="docs/gpu")
    one.add_argument("--seconds", type=float, default=460, help="for everything (460)")
    one.add_argument("--jobs", type=int, default=6, help="processes of numerics at a time (6)")
    one.add_argument("--peers", type=pathlib.Path, help="a folder or wheels with fla-core")
    now = time.time_ns() % 2**31
    one.add_argument("--seed", type=int, default=now, help="of the inputs (the time)")
    one.add_argument("--worker", choices=("device", *PHASES), help=argparse.SUPPRESS)
    one.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    return one


class Report:
    """The processes of a report, and what they found."""

    def __init__(self, args: argparse.Namespace, names: list[str]):
        self.args = args
        # The seven first, should the time run out.
        self.names = sorted(names, key=lambda name: (name not in gpu_table.SEVEN, name))
        self.began = time.perf_counter()
        self.rows: list[Result] = []
        self.lock = threading.Lock()
        self.output = args.output or pathlib.Path("docs/gpu")
        self.name, self.head = "", ""

    def run(self) -> int:
        with tempfile.TemporaryDirectory() as folder:
            self.folder = pathlib.Path(folder)
            if self.args.dry_run and self.args.output is None:
                self.output = self.folder / "gpu"
            code = self._device()
            if code:
                return code
            phases = self.args.only or USUAL
            self._keep(phases)
            for i, phase in enumerate(phases):
                self._phase(phase, phases[i:])
        bad = [r for r in self.rows if r.bad and r.phase == "numerics"]
        red = sum(r.bad for r in self.rows)
        print(
            f"{len(self.rows)} findings, {red} red, {len(bad)} of them about numerics, "
            f"{time.perf_counter() - self.began:.0f} s, seed {self.args.seed}: "
            f"{self.output / self.name}.md"
        )
        return 1 if bad else 0

    def _device(self) -> int:
        """Asks what device there is; the page's head."""
        found: list[Result] = []
        self._process("device", "", 90, found.append)
        row = found[-1] if found else Result("device", "", status="CRASHED: it said nothing")
        text = (
            "gpu-report: NOTHING WAS RUN: it needs a Hopper GPU and jax with CUDA, and {}. "
            "--dry-run shows on a CPU that the report works."
        )
        if row.status != "ok":
            print(text.format(row.status), file=sys.stderr)
            return 3
        if not self.args.dry_run and row.what not in ("gpu", "cuda"):
            print(text.format(f"jax sees a {row.operator} here"), file=sys.stderr)
            return 3
        kind = "dry run" if self.args.dry_run else row.operator
        self.name = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
        day = time.strftime("%Y-%m-%d")
        self.head = _HEAD.format(kind=kind, versions=row.detail, day=day, seed=self.args.seed)
        print(f"{kind}, {row.detail}, seed {self.args.seed}", flush=True)
        return 0

    def _keep(self, phases: tuple[str, ...]) -> None:
        """Of a table that is there, what this report does not measure anew."""
        path = self.output / f"{self.name}.csv"
        if (self.args.only or self.args.names) and path.exists():
            names = lambda phase: map(operator_of, names_of(phase, self.names))
            anew = [(phase, name) for phase in phases for name in names(phase)]
            old = result.read(path)
            self.rows = [r for r in old if not {(r.phase, r.operator), (r.phase, "")} & {*anew}]

    def _phase(self, phase: str, later: tuple[str, ...]) -> None:
        names = names_of(phase, self.names, whole=self.args.dry_run)
        jobs = self.args.jobs if phase == "numerics" else 1
        rest = lambda: self.args.seconds - (time.perf_counter() - self.began)
        for_later = rest() * (1 - SHARES[phase] / sum(SHARES[x] for x in later))
        left = [len(names)]

        def one(name: str) -> None:
            # Numerics take what they need, others a fair part of their phase's share.
            fair = rest() if phase == "numerics" else (rest() - for_later) / max(1, left[0])
            # The interpreter takes its time.
            more = 4 if self.args.dry_run else LONGER.get(operator_of(name), 1)
            limit = min(PHASES[phase] * more, fair, rest())
            left[0] -= 1
            if limit < 5:
                self._add(
                    Result(phase, operator_of(name) or phase, status="skipped: no time was left")
                )
            else:
                self._process(phase, name, limit, self._add)

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, names))

    def _process(self, phase: str, name: str, limit: float, add) -> None:
        """One process; what it says goes to `add`, its end too unless it ended well."""
        args = self.args
        if phase == "models":  # the kernels do not know the models
            line = [sys.executable, "-m", "seqzoo.eval.gpu_models", name]
        else:
            line = [sys.executable, "-m", "pallas_kernels.gpu_report", "--worker", phase]
            line += ["--seed", str(args.seed), "--folder", str(self.folder)]
            line += [name] if name else []
        line += ["--dry-run"] if args.dry_run else []
        doing = "its start"
        with tempfile.TemporaryFile("w+") as noise:
            worker = subprocess.Popen(
                line,
                stdout=subprocess.PIPE,
                stderr=noise,
                text=True,
                env=self._environment(phase),
                start_new_session=True,
            )
            late = threading.Event()

            def stop() -> None:
                late.set()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)

            timer = threading.Timer(limit, stop)
            timer.start()
            assert worker.stdout is not None
            for text in worker.stdout:
                try:
                    told = json.loads(text)
                except ValueError:  # what a library printed
                    continue
                if not isinstance(told, dict):
                    continue
                if "doing" in told:
                    doing = told["doing"]
                elif "phase" in told and told.keys() <= {*Result._fields}:
                    add(Result(**told))
            code = worker.wait()
            timer.cancel()
            if code == 0:
                return
            noise.seek(0)
            last = last_words(noise.read())
        why = f"TOO LONG: {limit:.0f} s were over" if late.is_set() else f"CRASHED: {last or code}"
        add(Result(phase, operator_of(name) or phase, status=f"{why} (at {doing})"))

    def _environment(self, phase: str) -> dict[str, str]:
        own = dict(os.environ)
        if self.args.dry_run:
            own["JAX_PLATFORMS"] = "cpu"
        elif (given := own.get("JAX_PLATFORMS")) and "cpu" not in given.split(","):
            own["JAX_PLATFORMS"] = f"{given},cpu"  # float64 is computed there
        if phase == "numerics":  # several at a time share the memory
            own["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        if phase in ("peers", "models") and self.args.peers:
            paths = [self.args.peers.resolve(), self._unpacked()]
            own["PYTHONPATH"] = os.pathsep.join([*map(str, paths), own.get("PYTHONPATH", "")])
        return own

    def _unpacked(self) -> pathlib.Path:
        """The wheels of --peers as a folder: Triton reads the sources of its kernels."""
        site = self.folder / "site"
        if not site.exists():
            for wheel in sorted(self.args.peers.glob("*.whl")):
                zipfile.ZipFile(wheel).extractall(site)
        return site

    def _add(self, row: Result) -> None:
        """Keeps a finding, tells it, and writes the page anew."""
        with self.lock:
            self.rows.append(row)
            print(f"{time.perf_counter() - self.began:5.0f} s  {result.line(row)}", flush=True)
            page.write(self.output, self.name, self.rows, self.head)


def last_words(noise: str) -> str:
    """Of what a process wrote before it broke, the error."""
    lines = [line.strip() for line in noise.splitlines() if line.strip(" ^-~")]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    return " ".join((errors or lines or [""])[-1].split())[:300]


_HEAD = """# The GPU kernels on a {kind}

Written by `python -m pallas_kernels.gpu_report` on {day}: {versions}; seed {seed}. The table is
beside this page (csv).

Numerics: outputs, states and every gradient of freshly drawn inputs against float64 (the reference;
at real lengths the portable form), twice, the second time over memory full of nan; both runs must
give the same bits (cuDNN's, which adds up in no fixed order, the same digits). Times: warm, the
median of 15 rounds in which every candidate takes its turn, over several sets of inputs that
together outgrow the caches; what a call of nothing takes, the host takes, and no kernel shows less.
*floor*: what the call needs at least (bytes, operations of matrix products, exponentials:
`op.cost`) by what the device does at best, measured below; the largest binds. A cell in bold is
red: what went wrong, or what is missing."""


if __name__ == "__main__":
    sys.exit(main())
