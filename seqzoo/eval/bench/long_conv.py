"""long_conv: Fourier, Monarch and Toeplitz form side by side against length.

One sequence of 64 channels and a kernel as long as the sequence, float32, forward alone and with
all gradients; the forms of one length take turns. `floor` is what the operations of a fast Fourier
transform and the bytes of the call take at the rates that this machine reaches.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import long_conv
from pallas_kernels.core import bench
from pallas_kernels.core.costs import Device, roofline
from pallas_kernels.core.testing import ArgSpec
from pallas_kernels.long_conv.arg_specs import named
from pallas_kernels.long_conv.xla import XlaConfig
from seqzoo.eval.bench.operators import abstract, draw

FORMS = {
    "fft": XlaConfig(form="fft"),
    "monarch, 2 stages": XlaConfig(form="monarch", stages=2),
    "monarch, 3 stages": XlaConfig(form="monarch", stages=3),
    "direct": XlaConfig(form="direct"),
}
LONGEST_DIRECT = 2048  # beyond, its quadratic work takes seconds
LENGTHS = (256, 1024, 2048, 4096, 16_384, 65_536, 131_072)


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: what was measured, and its floor on this machine."""
    rounds = 3 if quick else 9
    machine = bench.this_machine(rounds=rounds)
    rows = []
    for t in LENGTHS[1:3] if quick else LENGTHS:
        for backward in (False, True):
            rows += side_by_side(at_length(t), machine, rounds, backward=backward)
    for name in () if quick else ("m2_bert", "long"):
        rows += side_by_side(named(name), machine, rounds, backward=True)
    rows += packed(at_length(2048 if quick else 16_384), rounds)
    return [*rows, step(rounds), memory(32_768)]


def side_by_side(
    spec: ArgSpec, machine: Device, rounds: int, *, backward: bool
) -> list[dict[str, object]]:
    """The forms of one call take turns."""
    direct_too = spec.sizes["t"] <= LONGEST_DIRECT
    forms = {
        name: program(spec, config, backward=backward)
        for name, config in FORMS.items()
        if direct_too or name != "direct"
    }
    found = bench.take_turns(forms, draw(long_conv, spec), rounds=rounds)
    passes = (False, True) if backward else (False,)
    costs = (long_conv.cost(**spec.sizes, backward=b) for b in passes)  # type: ignore[attr-defined]
    floor = 1e3 * sum(roofline(cost, machine, dtype="float32") for cost in costs)
    case = f"{title(spec)}, {'forward + gradients' if backward else 'forward'}"
    rows = [row(f"{case}, {name}", "ms", 1e3 * x.median, floor) for name, x in found.items()]
    if direct_too:
        faster = bench.times_faster(found["direct"], found["fft"])
        rows.append(row(f"{case}, fft against direct", "x faster", faster))
    return rows


def packed(spec: ArgSpec, rounds: int) -> list[dict[str, object]]:
    """Documents of a quarter of the row, by dyadic blocks, against one document."""
    dy, *arrays = draw(long_conv, spec)
    b, t = dy.shape[:2]
    ids = jnp.repeat(jnp.arange(1, 5), t // 4)[None].repeat(b, axis=0)
    forms = {
        name: bench.forward_and_gradients(functools.partial(call(spec), segment_ids=of))
        for name, of in (("one document", None), ("four packed documents", ids))
    }
    found = bench.take_turns(forms, (dy, *arrays), rounds=rounds)
    case = f"{title(spec)}, forward + gradients"
    rows = [row(f"{case}, {name}", "ms", 1e3 * x.median) for name, x in found.items()]
    slower = bench.times_faster(found["four packed documents"], found["one document"])
    return [*rows, row(f"{case}, packed by one document", "x", slower)]


def step(rounds: int) -> dict[str, object]:
    """One token with a history of 4,095."""
    dy, u, kernel = draw(long_conv, at_length(4096))
    _, state = jax.eval_shape(long_conv, u, kernel)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    one = lambda u, kernel, state: long_conv(u, kernel, initial_state=state)
    found = bench.take_turns({"": one}, (u[:, :1], kernel, state), rounds=rounds)[""]
    case = f"{title(at_length(4096))}, one more token"
    return row(case, "ms", 1e3 * found.median)


def memory(t: int) -> dict[str, object]:
    """Temporaries from the compiler; nothing is run."""
    spec = at_length(t)
    _, found = bench.compile_(program(spec, None, backward=True), *abstract(long_conv, spec, t))
    case = f"{title(spec)}, forward + gradients, temporaries"
    return row(case, "MB", found.temp_bytes / 1e6)


def program(spec: ArgSpec, config: XlaConfig | None, *, backward: bool):
    """Forward, or forward and all gradients, of (cotangent, *arrays)."""
    form = functools.partial(call(spec), config=config)
    if backward:
        return bench.forward_and_gradients(form)
    return lambda dy, *arrays: form(*arrays)[0]


def call(spec: ArgSpec):
    """long_conv of the arrays that the spec gives, in the order in which they are drawn."""
    names = ("u", "kernel", *spec.given)

    def by_name(*arrays, **how):
        return long_conv(**dict(zip(names, arrays, strict=True)), **how)

    return by_name


def at_length(t: int) -> ArgSpec:
    """One sequence, and a kernel of its length."""
    return dataclasses.replace(named("bare"), sizes=dict(b=1, t=t, e=64, l=t))


def title(spec: ArgSpec) -> str:
    b, t, e = (spec.sizes[x] for x in "bte")
    return f"long_conv {spec.name} B{b} L{t:,} D{e}"


def row(case: str, unit: str, measured: float, floor: float | None = None) -> dict[str, object]:
    return {
        "bench": "long_conv",
        "case": case,
        "measured": round(measured, 1 if measured >= 10 else 2),
        "unit": unit,
        "floor": "" if floor is None else round(floor, 2),
        "to reach": "",
    }
