"""taylor_attention: the chunked form against the quadratic one by length, memory, linearity.

B1 H4, queries and keys of 16, values of 64, float32; forward and all gradients. `floor` is what the
operations and bytes of the call take at the rates that this machine reaches.
"""

import dataclasses
import itertools

from pallas_kernels import taylor_attention
from pallas_kernels.core import bench
from pallas_kernels.core.costs import Device, roofline
from pallas_kernels.core.testing import ArgSpec
from pallas_kernels.taylor_attention.arg_specs import named
from pallas_kernels.taylor_attention.xla import XlaConfig
from seqzoo.eval.bench.operators import abstract, draw

FULL_MAP = 273  # features of the map that is not packed, which the source stores


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: what was measured, its floor on this machine, and the figure to reach."""
    machine = bench.this_machine(rounds=3 if quick else 9)
    rounds = 3 if quick else 9
    rows = crossing((256, 512, 2048) if quick else (128, 256, 512, 1024, 2048, 4096), rounds)
    rows.append(memory(32_768))
    rows += linear((4096, 8192) if quick else (2048, 4096, 8192, 16_384, 32_768, 65_536), rounds)
    return rows + [speed(name, machine, rounds) for name in ("issue", "mqar", "based_360m")]


def crossing(lengths: tuple[int, ...], rounds: int) -> list[dict[str, object]]:
    """The two forms take turns at each length; the note says which one is taken by itself."""
    rows = []
    for t in lengths:
        spec = at_length(t)
        found = bench.take_turns(
            {form: program(XlaConfig(form=form)) for form in ("quadratic", "chunked")},
            draw(taylor_attention, spec),
            rounds=rounds,
        )
        faster = bench.times_faster(found["quadratic"], found["chunked"])
        taken = XlaConfig.heuristic(spec.sizes, "cpu").form
        for form, measured in found.items():
            rows.append(row(f"{title(spec)}, {form}", "ms", 1e3 * measured.median))
        reach = "> 1" if t >= 2048 else ""
        case = f"{title(spec)}, chunked against quadratic ({taken} is taken)"
        rows.append(row(case, "x faster", faster, reach=reach))
    return rows


def memory(t: int) -> dict[str, object]:
    """Temporaries from the compiler; nothing is run."""
    spec = at_length(t)
    _, found = bench.compile_(program(None), *abstract(taylor_attention, spec, t))
    stored = 2 * 4 * t * spec.sizes["b"] * spec.sizes["h"] * FULL_MAP
    reach = f"<= {stored / 8e6:.1f}"
    return row(f"{title(spec)}, temporaries", "MB", found.temp_bytes / 1e6, reach=reach)


def linear(lengths: tuple[int, ...], rounds: int) -> list[dict[str, object]]:
    """Time against length, and the ratio at each doubling; the lengths take turns."""

    def beginning(t):
        whole = program(None)
        return lambda *arrays: whole(*(x[:, :t] for x in arrays))

    longest = at_length(max(lengths))
    found = bench.take_turns(
        {str(t): beginning(t) for t in lengths}, draw(taylor_attention, longest), rounds=rounds
    )
    rows = [row(title(at_length(t)), "ms", 1e3 * found[str(t)].median) for t in lengths]
    for short, long in itertools.pairwise(lengths):
        ratio = bench.times_faster(found[str(long)], found[str(short)])
        case = f"{title(at_length(long))}, by half the length"
        rows.append(row(case, "x", ratio, reach="<= 2.2"))
    return rows


def speed(name: str, machine: Device, rounds: int) -> dict[str, object]:
    """A shape of use, as it is called, against the machine's floor."""
    spec = named(name)
    found = bench.take_turns({"": program(None)}, draw(taylor_attention, spec), rounds=rounds)[""]
    costs = (taylor_attention.cost(**spec.sizes, backward=b) for b in (False, True))
    floor = 1e3 * sum(roofline(cost, machine, dtype="float32") for cost in costs)
    return row(f"{name}: {title(spec)}", "ms", 1e3 * found.median, floor=floor)


def program(config):
    """Forward and all gradients by one form; None = as it chooses."""
    return bench.forward_and_gradients(lambda *arrays: taylor_attention(*arrays, config=config))


def at_length(t: int) -> ArgSpec:
    """The shape of the issue at another length."""
    spec = named("issue")
    return dataclasses.replace(spec, sizes={**spec.sizes, "t": t})


def title(spec: ArgSpec) -> str:
    b, t, h, k, v = (spec.sizes[x] for x in "bthkv")
    return f"taylor_attention B{b} L{t:,} H{h} k{k} v{v}"


def row(case: str, unit: str, measured: float, *, floor=None, reach: str = "") -> dict[str, object]:
    return {
        "bench": "taylor_attention",
        "case": case,
        "measured": round(measured, 1 if measured >= 10 else 2),
        "unit": unit,
        "floor": "" if floor is None else round(floor, 1),
        "to reach": reach,
    }
