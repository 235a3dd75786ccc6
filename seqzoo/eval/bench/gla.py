"""simple_gla and gla: chunks against the recurrence, memory, linearity.

B1 H4, keys and values of 64, float32. The recurrence is the operator's own definition, one
`lax.scan` step per token. `floor` is what the operations and bytes of a call take at the rates that
this machine reaches.
"""

import dataclasses
import functools
from collections.abc import Callable

from pallas_kernels import gla, simple_gla
from pallas_kernels.core import bench
from pallas_kernels.core.costs import Device, roofline
from pallas_kernels.core.testing import ArgSpec
from pallas_kernels.gla import arg_specs as gla_specs
from pallas_kernels.simple_gla import arg_specs as simple_specs
from seqzoo.eval.bench.operators import abstract, draw

# Shapes of use, besides that of the issue.
USES = {simple_gla: ("mqar", "mamba2_130m", "retention_340m"), gla: ("mqar", "gla_340m")}
NAMED = {simple_gla: simple_specs.named, gla: gla_specs.named}


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: what was measured, its floor on this machine, and the figure to reach."""
    machine = bench.this_machine(rounds=3 if quick else 9)
    rounds = 3 if quick else 9
    lengths = (4096, 8192) if quick else (2048, 4096, 8192, 16_384, 32_768, 65_536)
    rows = []
    for op in (simple_gla, gla):
        rows += against_recurrence(op, rounds)
        rows.append(memory(op, 32_768))
        rows += linear(op, lengths, rounds)
        rows += [
            speed(op, name, machine, rounds)
            for name in ("issue", *USES[op][: 1 if quick else None])
        ]
    return rows


def against_recurrence(op: Callable, rounds: int) -> list[dict[str, object]]:
    """Chunks and recurrence take turns, forward alone and with all gradients."""
    spec = NAMED[op]("issue")
    arguments = draw(op, spec)
    rows = []
    for what, make, reach in (
        ("forward", lambda form: lambda dy, *arrays: form(*arrays), ""),
        ("forward + gradients", bench.forward_and_gradients, ">= 10"),
    ):
        forms = {
            name: make(functools.partial(op, implementation=name)) for name in ("reference", "xla")
        }
        found = bench.take_turns(forms, arguments, rounds=rounds)
        for name, measured in found.items():
            rows.append(row(f"{title(op, spec)}, {what}, {name}", "ms", 1e3 * measured.median))
        faster = bench.times_faster(found["reference"], found["xla"])
        case = f"{title(op, spec)}, {what}, chunks against recurrence"
        rows.append(row(case, "x faster", faster, reach=reach))
    return rows


def memory(op: Callable, t: int) -> dict[str, object]:
    """Temporaries from the compiler; nothing is run. To reach: 1/16 of a state per token."""
    spec = at_length(op, t)
    _, found = bench.compile_(bench.forward_and_gradients(op), *abstract(op, spec, t))
    b, h, k, v = (spec.sizes[x] for x in "bhkv")
    reach = f"<= {4 * b * t * h * k * v / 16e6:.0f}"
    case = f"{title(op, spec)}, forward + gradients, temporaries"
    return row(case, "MB", found.temp_bytes / 1e6, reach=reach)


def linear(op: Callable, lengths: tuple[int, ...], rounds: int) -> list[dict[str, object]]:
    """Time against length, and the ratio at each doubling; the lengths take turns."""
    specs = [at_length(op, t) for t in lengths]
    program = bench.forward_and_gradients(op)
    # Each takes the arguments of all lengths and uses its own, so that they can take turns.
    forms = {
        title(op, spec): lambda *calls, i=i: program(*calls[i]) for i, spec in enumerate(specs)
    }
    found = bench.take_turns(forms, tuple(draw(op, spec) for spec in specs), rounds=rounds)
    rows, before = [], None
    for name, measured in found.items():
        case = f"{name}, forward + gradients"
        rows.append(row(case, "ms", 1e3 * measured.median))
        if before is not None:
            ratio = bench.times_faster(measured, before)
            rows.append(row(f"{case}, by half the length", "x", ratio, reach="<= 2.2"))
        before = measured
    return rows


def speed(op: Callable, name: str, machine: Device, rounds: int) -> dict[str, object]:
    """A shape of use, forward and all gradients, against the machine's floor."""
    spec = NAMED[op](name)
    program = bench.forward_and_gradients(op)
    found = bench.take_turns({"": program}, draw(op, spec), rounds=rounds)[""]
    costs = (op.cost(**spec.sizes, backward=b) for b in (False, True))  # type: ignore[attr-defined]
    floor = 1e3 * sum(roofline(cost, machine, dtype="float32") for cost in costs)
    case = f"{name}: {title(op, spec)}, forward + gradients"
    return row(case, "ms", 1e3 * found.median, floor=floor)


def at_length(op: Callable, t: int) -> ArgSpec:
    """The shape of the issue at another length."""
    spec = NAMED[op]("issue")
    return dataclasses.replace(spec, sizes={**spec.sizes, "t": t})


def title(op: Callable, spec: ArgSpec) -> str:
    b, t, h, k, v = (spec.sizes[x] for x in "bthkv")
    shared = spec.sizes.get("g", h)
    heads = f"H{h}" if shared == h else f"H{h} (q, k: {shared})"
    return f"{op.__name__} B{b} L{t:,} {heads} k{k} v{v}"


def row(case: str, unit: str, measured: float, *, floor=None, reach: str = "") -> dict[str, object]:
    return {
        "bench": "gla",
        "case": case,
        "measured": round(measured, 1 if measured >= 10 else 2),
        "unit": unit,
        "floor": "" if floor is None else round(floor, 1),
        "to reach": reach,
    }
