"""`seqzoo bench`: measures operators and the train loop on this machine."""

import argparse
import importlib
import inspect
import os
import pathlib
import pkgutil
import platform

from seqzoo.cli.common import print_json, print_table
from seqzoo.errors import ConfigError, suggest
from seqzoo.train import environment

EPILOG = """examples:
  seqzoo bench                       everything (some minutes)
  seqzoo bench decode compile --quick
  seqzoo bench training --peer-python ../peer/bin/python
  seqzoo bench feeding --json > feeding.json
  seqzoo bench --tune selective_scan --to tuned.json      on a TPU or GPU: the best tile sizes

"to reach" is the project's own figure. Candidates that are compared take turns, so that a busy
machine slows all of them alike; still, measure on a quiet one.

--tune times candidates for the tile sizes of each operator's kernel (or of those named) on the
device of this machine, at the shapes of real models, and writes them to a table that every later
call reads if the environment variable PALLAS_KERNELS_TUNED names it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(modules())}"
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller, for a first look")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--tune", action="store_true", help="tile sizes of the operators NAME, or of all"
    )
    parser.add_argument(
        "--to", default="tuned.json", metavar="FILE", help="the table of --tune (tuned.json)"
    )
    parser.add_argument(
        "--peer-python",
        metavar="PYTHON",
        help="of an environment with torch, transformers and mambapy, to train beside (training)",
    )


def modules() -> dict[str, str]:
    """The benches that there are, with their modules; what begins with _ or is a script of its own
    is none."""
    import seqzoo.eval.bench as package

    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    found = {n: f"{package.__name__}.{n}" for n in names if not n.startswith(("_", "peer_"))}
    # Sweeps stand above seqzoo.eval.
    return found | {"sweep": "seqzoo.sweep.bench", "vectorize": "seqzoo.sweep.bench_vectorize"}


def run(args: argparse.Namespace) -> int:
    if args.tune:
        return run_tune(args.names, pathlib.Path(args.to), rounds=3 if args.quick else 9)
    there = modules()
    for name in args.names:
        if name not in there:
            raise ConfigError(
                f"there is no bench '{name}'{suggest(name, there)}; there are {', '.join(there)}"
            )
    machine = describe_machine()
    if not args.json:
        print("\n".join(f"{key:<10}{value}" for key, value in machine.items()))
    results = {}
    for name in args.names or there:
        measure = importlib.import_module(there[name]).run
        options = {"peer_python": args.peer_python} if args.peer_python else {}
        taken = inspect.signature(measure).parameters
        rows = measure(args.quick, **{k: v for k, v in options.items() if k in taken})
        results[name] = rows
        if not args.json:
            print()
            print_table(rows)
    if args.json:
        print_json({"machine": machine, "quick": args.quick, "results": results})
    return 0


def run_tune(names: list[str], path: pathlib.Path, *, rounds: int) -> int:
    """Measures tile sizes on this machine's device and writes them to a table."""
    from pallas_kernels import OPERATORS
    from pallas_kernels.core import dispatch, tune, tuned

    kind, form = dispatch.device_kind(), tune.platform_kernel()
    if form is None:
        raise ConfigError(
            f"--tune measures kernels on the device that they are for, and this is a {kind}; "
            "run it on a machine with a TPU or an NVIDIA GPU"
        )
    for name in names:
        if name not in OPERATORS:
            raise ConfigError(
                f"there is no operator '{name}'{suggest(name, OPERATORS)}; there are "
                f"{', '.join(OPERATORS)}"
            )
    entries = []
    for name in names or OPERATORS:
        for spec in tune.specs_for(OPERATORS[name], form):
            print(f"\n{name} {spec.name}")
            try:
                entry, _ = tune.tune(OPERATORS[name], spec, form, rounds=rounds, say=print)
            except (NotImplementedError, LookupError, RuntimeError) as error:
                print(f"not tuned: {error}")
                continue
            entries.append(entry)
            tuned.write(path, kind, entries)
    if not entries:
        raise ConfigError(f"no operator that was asked for has a kernel that runs on a {kind}")
    print(f"\nwrote {path}; {tuned.VARIABLE}={path} makes every call read it")
    return 0


def describe_machine() -> dict[str, str]:
    """What a figure must be quoted with."""
    import jax

    versions = environment.versions()
    git = environment.git_state()
    commit = (git["commit"] or "no checkout")[:10] + (" (changed)" if git["dirty"] else "")
    devices = jax.devices()
    busy = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return {
        "machine": f"{platform.machine()}, {environment.threads()} CPU threads{busy}",
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": commit,
    }
