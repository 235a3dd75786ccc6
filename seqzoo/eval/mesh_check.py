"""`python -m seqzoo.eval.mesh_check`: whole train steps compiled for a TPU mesh that is not there.

The real train step (seqzoo/train) of each small model, on the compile-only devices of a v5e 2x4
slice: kernels inside shard_map, parameters and batch spread over the mesh. What is counted:
kernels, collectives by kind, memory per device. Nothing is run.
"""

import argparse
import csv
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pallas_kernels.core import aot, hlo

EPILOG = """examples:
  python -m seqzoo.eval.mesh_check                     all small models
  python -m seqzoo.eval.mesh_check mamba_small
  python -m seqzoo.eval.mesh_check --check             breaks where kernels or collectives changed
  python -m seqzoo.eval.mesh_check --write             writes docs/train_steps.csv, docs/kernels.md

`make check-tpu-full` runs it; libtpu must be importable (see python -m pallas_kernels.check_tpu).
"""

TOPOLOGY = "v5e:2x4"
# Sizes of the axes data, fsdp, tensor; one head cannot be cut.
WIDE, ONE_HEAD = (2, 2, 2), (2, 4, 1)
TABLE = pathlib.Path("docs/train_steps.csv")
BEGIN, END = "<!-- begin: written by mesh_check -->", "<!-- end of mesh_check -->"

# Eight rows of 512 bytes.
_TEXT = ("data=stdlib_text", "task=next_token", "data.seq_len=512", "trainer.global_batch_size=8")
_MASKED = ("data=masked_stdlib_text", "task=masked_tokens", *_TEXT[2:])
_CUT = ("mamba", "mamba2", "based", "gla", "retention", "mega", "tcnca")
_WHOLE = ("gated_deltanet", "mom", "titans_lmm", "titans_mac", "titans_mag", "titans_mal")
MODELS: dict[str, tuple[tuple[str, ...], tuple[int, int, int]]] = {
    **{f"{name}_small": (_TEXT, WIDE) for name in _CUT},
    **{f"{name}_small": (_TEXT, ONE_HEAD) for name in _WHOLE},
    "m2_small": (_MASKED, WIDE),
}


class Step(NamedTuple):
    """A compiled train step.

    Attributes:
        stack: versions of jax and libtpu.
        model: of configs/model.
        mesh: devices along data, fsdp and tensor.
        status: "compiled", or what stood against it.
        kernels: Pallas calls by name, each with how often it stands in the program.
        collectives: by kind; a loop's body counts once.
        temp: bytes for temporaries, per device.
        peak: bytes at most, per device.
    """

    stack: str
    model: str
    mesh: str
    status: str
    kernels: str = ""
    collectives: str = ""
    temp: int | None = None
    peak: int | None = None

    @property
    def key(self) -> tuple[str, str]:
        return (self.stack, self.model)


def overrides(model: str) -> tuple[str, ...]:
    """The configuration of a model's train step."""
    what, sizes = MODELS[model]
    mesh = zip(("data", "fsdp", "tensor"), sizes, strict=True)
    return (f"model={model}", *what, *(f"mesh.{axis}={size}" for axis, size in mesh))


def mesh_of(model: str) -> str:
    """The mesh as tables have it: "2 x 4 x 1"."""
    return " x ".join(map(str, MODELS[model][1]))


def compile_step(model: str, stack: str) -> Step:
    """Compiles the train step of a model, as `seqzoo train` would build it there."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from seqzoo.config.compose import compose
    from seqzoo.train import mesh as meshes
    from seqzoo.train.setup import setup
    from seqzoo.train.step import train_step

    config = compose(overrides(model))
    run = setup(config, devices=aot.tpu_devices(TOPOLOGY))
    rows = meshes.batch_sharding(run.spec.mesh, run.spec.rules)
    whole = NamedSharding(run.spec.mesh, PartitionSpec())
    abstract = lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at)
    shape = (run.trainer.global_batch_size, run.config["data"]["seq_len"])
    batch = {
        name: jax.ShapeDtypeStruct(shape, "int32", sharding=rows) for name in ("tokens", "targets")
    }
    hyper = abstract(run.hyper(0), whole)
    seed = jax.ShapeDtypeStruct((), "uint32", sharding=whole)
    step = train_step(run.spec)
    found = aot.compile_lowered(lambda: step.lower(run.state, batch, hyper, seed))
    names: dict[str, int] = {}
    for kernel in found.kernels:
        names[kernel.name] = names.get(kernel.name, 0) + 1
    return Step(
        stack,
        model,
        mesh_of(model),
        "compiled",
        _text(names),
        _text(hlo.collectives(found.text)),
        found.temp,
        found.peak,
    )


def _text(counts: Mapping[str, int]) -> str:
    return " ".join(f"{name}:{count}" for name, count in sorted(counts.items()))


def changes(table: Iterable[Step], found: Iterable[Step]) -> list[str]:
    """What is worse than the table: no compilation, fewer kernels, more collectives, memory."""
    known, wrong = {one.key: one for one in table}, []
    for step in found:
        before = known.get(step.key)
        if step.status != "compiled":
            if before is None or before.status == "compiled":
                wrong.append(f"{step.model}: {step.status}")
            continue
        if before is None:
            if step.stack in {stack for stack, _ in known}:
                wrong.append(f"{step.model}: the table has no row of it")
            continue
        if before.kernels != step.kernels:
            wrong.append(f"{step.model}: kernels were {before.kernels}, now {step.kernels}")
        if _total(step.collectives) > _total(before.collectives):
            wrong.append(f"{step.model}: collectives {before.collectives} -> {step.collectives}")
        if step.temp and before.temp and step.temp > 1.05 * before.temp + 2**20:
            wrong.append(f"{step.model}: temporaries {before.temp:,} -> {step.temp:,}")
    return wrong


def _total(counts: str) -> int:
    return sum(int(one.rpartition(":")[2]) for one in counts.split())


def read(path: pathlib.Path) -> list[Step]:
    """The rows of a table; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    whole = lambda text: int(text) if text else None
    return [Step(**{**r, "temp": whole(r["temp"]), "peak": whole(r["peak"])}) for r in rows]


def write(path: pathlib.Path, steps: Iterable[Step]) -> None:
    """Writes the table, and the tables of docs/kernels.md beside it."""
    steps = sorted(steps)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Step._fields)
        writer.writerows(["" if x is None else x for x in step] for step in steps)
    page = path.with_name("kernels.md")
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{markdown(steps)}\n{END}{rest.split(END)[1]}")


def markdown(steps: Iterable[Step]) -> str:
    """One table per stack."""
    steps, parts = list(steps), []
    mib = lambda count: "" if count is None else f"{count / 2**20:.1f} MiB"
    for stack in sorted({one.stack for one in steps}):
        parts += [f"### {stack}", "", "| model | mesh | kernels | collectives | temp HBM | peak |"]
        parts += ["|---|---|---|---|---:|---:|"]
        for one in steps:
            if one.stack == stack:
                told = one.kernels.replace(" ", ", ").replace(":", " x ") or "none"
                told = told if one.status == "compiled" else one.status.replace("|", "/")
                also = one.collectives.replace(" ", ", ").replace(":", " x ")
                cells = (one.model, one.mesh, told, also, mib(one.temp), mib(one.peak))
                parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Each model in a process of its own; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m seqzoo.eval.mesh_check",
        description=f"Compiles train steps for a {TOPOLOGY} mesh without a TPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="MODEL", help="all small ones")
    parser.add_argument("--check", action="store_true", help="compare with the committed table")
    parser.add_argument("--write", action="store_true", help="put the figures into the table")
    parser.add_argument("--table", type=pathlib.Path, default=TABLE)
    parser.add_argument("--worker", metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        return _work(args.worker)
    unknown = [name for name in args.names if name not in MODELS]
    if unknown:
        print(f"there is no {unknown[0]} here; there are {', '.join(MODELS)}")
        return 2
    found = [_run(name) for name in args.names or MODELS]
    table = read(args.table)
    wrong = changes(table, found) if args.check else changes([], found)
    if args.write:
        keys = {one.key for one in found}
        write(args.table, [*(one for one in table if one.key not in keys), *found])
    for text in wrong:
        print(f"WRONG: {text}")
    compiled = sum(one.status == "compiled" for one in found)
    print(f"{compiled} of {len(found)} train steps compiled for {TOPOLOGY}, {len(wrong)} wrong")
    return 1 if wrong else 0


def _run(model: str) -> Step:
    command = [sys.executable, "-m", "seqzoo.eval.mesh_check", "--worker", model]
    with tempfile.TemporaryFile("w+") as noise:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=noise, text=True)
        noise.seek(0)
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            step = Step(**json.loads(lines[-1]))
        else:
            last = " ".join(noise.read().split())[-300:]
            step = Step("", model, "", f"the process ended with {done.returncode}: {last}")
    told = f"{step.kernels or 'no kernel'}; {step.collectives}"
    print(f"{model:<24}{told if step.status == 'compiled' else step.status}", flush=True)
    return step


def _work(model: str) -> int:
    aot.prepare()
    stack = aot.stack()
    try:
        step = compile_step(model, stack)
    except Exception as error:  # what the compiler says is the finding
        told = " ".join(f"{type(error).__name__}: {error}".split())
        step = Step(stack, model, mesh_of(model), told[:300])
    print(json.dumps(step._asdict()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
