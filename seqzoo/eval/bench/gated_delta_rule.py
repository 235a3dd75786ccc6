"""gated_delta_rule: chunks against the recurrence, linearity, memory.

The recurrence is the operator's own definition, one `lax.scan` step per token. `floor` is what the
operations and bytes of a call take at the rates that this machine reaches.
"""

import dataclasses
import functools

from pallas_kernels import gated_delta_rule
from pallas_kernels.core import bench
from pallas_kernels.core.costs import Device, roofline
from pallas_kernels.core.testing import ArgSpec
from pallas_kernels.gated_delta_rule.arg_specs import named
from seqzoo.eval.bench.operators import abstract, draw

LENGTHS = (2048, 4096, 8192, 16_384, 32_768, 65_536)


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: what was measured, its floor on this machine, and the figure to reach."""
    machine = bench.this_machine(rounds=3 if quick else 9)
    rounds = 3 if quick else 11
    uses = ("issue", "mqar") if quick else ("issue", "mqar", "mom_340m")
    return [
        *against_recurrence(rounds),
        *linear(LENGTHS[:3] if quick else LENGTHS, rounds),
        memory(32_768),
        *(speed(named(name), machine, rounds) for name in uses),
    ]


def against_recurrence(rounds: int) -> list[dict[str, object]]:
    """B1 H4 k64 v64 L2048: both take turns, forward alone and with all gradients.

    With pauses: the gradient of the recurrence leaves 485 MB to be given back.
    """
    spec = named("issue")
    arguments = draw(gated_delta_rule, spec)
    rows = []
    for what, make, reach in (
        ("forward", lambda form: lambda dy, *arrays: form(*arrays), ">= 1"),
        ("forward + gradients", bench.forward_and_gradients, ">= 10"),
    ):
        forms = {
            name: make(functools.partial(gated_delta_rule, implementation=name))
            for name in ("reference", "xla")
        }
        found = bench.take_turns(forms, arguments, rounds=rounds, pause=0.2)
        case = f"{title(spec)}, {what}"
        rows += [row(f"{case}, {name}", "ms", 1e3 * x.median) for name, x in found.items()]
        faster = bench.times_faster(found["reference"], found["xla"])
        rows.append(row(f"{case}, chunks against recurrence", "x faster", faster, reach=reach))
    return rows


def linear(lengths: tuple[int, ...], rounds: int) -> list[dict[str, object]]:
    """Forward and all gradients: time against length, and the ratio at each doubling."""
    specs = [at_length(t) for t in lengths]
    program = bench.forward_and_gradients(gated_delta_rule)
    # Each takes the arguments of all lengths and uses its own, so that they can take turns.
    forms = {title(spec): lambda *calls, i=i: program(*calls[i]) for i, spec in enumerate(specs)}
    calls = tuple(draw(gated_delta_rule, spec) for spec in specs)
    found = bench.take_turns(forms, calls, rounds=rounds)
    rows, before = [], None
    for name, measured in found.items():
        case = f"{name}, forward + gradients"
        rows.append(row(case, "ms", 1e3 * measured.median))
        if before is not None:
            ratio = bench.times_faster(measured, before)
            rows.append(row(f"{case}, by half the length", "x", ratio, reach="<= 2.2"))
        before = measured
    return rows


def memory(t: int) -> dict[str, object]:
    """Temporaries from the compiler; nothing is run. To reach: 1/16 of a state per token."""
    spec = at_length(t)
    program = bench.forward_and_gradients(gated_delta_rule)
    _, found = bench.compile_(program, *abstract(gated_delta_rule, spec, t))
    b, h, k, v = (spec.sizes[x] for x in "bhkv")
    case = f"{title(spec)}, forward + gradients, temporaries"
    allowed = 4 * b * t * h * k * v / 16e6
    return row(case, "MB", found.temp_bytes / 1e6, reach=f"<= {allowed:.0f}")


def speed(spec: ArgSpec, machine: Device, rounds: int) -> dict[str, object]:
    """Forward and all gradients, against the machine's floor."""
    program = bench.forward_and_gradients(gated_delta_rule)
    found = bench.take_turns({"": program}, draw(gated_delta_rule, spec), rounds=rounds)[""]
    costs = (gated_delta_rule.cost(**spec.sizes, backward=b) for b in (False, True))  # type: ignore[attr-defined]
    floor = 1e3 * sum(roofline(cost, machine, dtype="float32") for cost in costs)
    case = f"{spec.name}: {title(spec)}, forward + gradients"
    return row(case, "ms", 1e3 * found.median, floor=floor)


def at_length(t: int) -> ArgSpec:
    """The shape of the issue at another length."""
    spec = named("issue")
    return dataclasses.replace(spec, sizes={**spec.sizes, "t": t})


def title(spec: ArgSpec) -> str:
    b, t, h, k, v = (spec.sizes[x] for x in "bthkv")
    return f"gated_delta_rule B{b} L{t:,} H{h} k{k} v{v}"


def row(case: str, unit: str, measured: float, *, floor=None, reach: str = "") -> dict[str, object]:
    return {
        "bench": "gated_delta_rule",
        "case": case,
        "measured": round(measured, 1 if measured >= 10 else 2),
        "unit": unit,
        "floor": "" if floor is None else round(floor, 1),
        "to reach": reach,
    }
