"""The operators: speed and memory against the plain form, and against what the machine allows.

`floor` is what this machine needs at least for the bytes, operations and exponentials of the call,
at the rates that it reaches in a copy, a matrix product and an array of exponentials.
"""

import json
import os
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import selective_scan, short_conv
from pallas_kernels.core import bench, testing
from pallas_kernels.core.costs import Device, roofline
from pallas_kernels.selective_scan import arg_specs as scan_specs
from pallas_kernels.short_conv import arg_specs as conv_specs

LONG = dict(b=1, t=262_144, e=64, n=16)


def associative_scan(u, delta, A, B, C, D, z, delta_bias):
    """The same as selective_scan, by the library's associative scan over all states."""
    d = jax.nn.softplus(delta + delta_bias)
    decay = jnp.exp(jnp.einsum("bte,en->bten", d, A))
    brought = jnp.einsum("bte,btn->bten", d * u, B)
    join = lambda left, right: (left[0] * right[0], right[0] * left[1] + right[1])
    _, h = jax.lax.associative_scan(join, (decay, brought), axis=1)
    y = jnp.einsum("bten,btn->bte", h, C) + D * u
    return y * jax.nn.silu(z), h[:, -1]


def scan(*arrays):
    """selective_scan as Mamba calls it."""
    return selective_scan(*arrays, delta_softplus=True)


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: what was measured, its floor on this machine, and the figure to reach."""
    machine = bench.this_machine(rounds=3 if quick else 9)
    rounds = 3 if quick else 11
    others = () if quick else ("training_small", "mamba_130m")
    rows = [
        speed(scan, scan_specs.named(name), machine, rounds) for name in ("issue", "mqar", *others)
    ]
    convolution = lambda *arrays: short_conv(*arrays, activation="silu")
    rows.append(speed(convolution, conv_specs.named("issue"), machine, rounds))
    rows += scan_against_associative(rounds)
    rows += scan_memory((1024, 4096) if quick else (1024, 4096, 16_384))
    return rows if quick else [*rows, long_scan()]


def scan_against_associative(rounds: int) -> list[dict[str, object]]:
    """B4 L1024 D256 N16, forward and all gradients: the two take turns.

    Beside a program that takes and gives back 700 MB per call, ours is slower than alone.
    """
    spec = scan_specs.named("issue")
    arguments = draw(selective_scan, spec)
    programs = {
        "ours": bench.forward_and_gradients(scan),
        "plain": bench.forward_and_gradients(associative_scan),
    }
    found = bench.take_turns(programs, arguments, rounds=rounds)
    ours, plain = found["ours"], found["plain"]
    faster = bench.times_faster(plain, ours)
    case = title("selective_scan", spec)
    return [
        row(f"{case}, associative_scan", "ms", 1e3 * plain.median),
        row(f"{case}, against associative_scan", "x faster", faster, reach=">= 3.5"),
        row(
            f"{case}, temporaries of associative_scan by ours",
            "x",
            plain.temp_bytes / ours.temp_bytes,
            reach=">= 25",
        ),
    ]


def speed(op, spec, machine: Device, rounds: int) -> dict[str, object]:
    """Milliseconds for forward and all gradients."""
    operator = selective_scan if op is scan else short_conv
    program = bench.forward_and_gradients(op)
    found = bench.take_turns({"": program}, draw(operator, spec), rounds=rounds)[""]
    floor = 1e3 * least_seconds(operator, spec, machine)
    return row(title(operator.__name__, spec), "ms", 1e3 * found.median, floor=floor)


def scan_memory(lengths: tuple[int, ...]) -> list[dict[str, object]]:
    """Temporaries against length, from the compiler; nothing is run."""
    rows = []
    spec = scan_specs.named("issue")
    b, e, n = (spec.sizes[x] for x in "ben")
    for t in lengths:
        shapes = abstract(selective_scan, spec, t)
        _, memory = bench.compile_(bench.forward_and_gradients(scan), *shapes)
        allowed = memory.argument_bytes + memory.output_bytes + 12 * b * e * n * t / 64 + 8 * 2**20
        rows.append(
            row(
                f"selective_scan B{b} L{t:,} D{e} N{n}, temporaries",
                "MB",
                memory.temp_bytes / 1e6,
                reach=f"<= {allowed / 1e6:.0f}",
            )
        )
    return rows


def long_scan() -> dict[str, object]:
    """262,144 tokens, forward and gradients, in a process of its own: its peak resident memory."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    child = subprocess.run(
        [sys.executable, "-m", "seqzoo.eval.bench.operators"],
        env=env,
        capture_output=True,
        text=True,
    )
    if child.returncode != 0:
        raise RuntimeError(f"the long scan ended with {child.returncode}: {child.stderr[-2000:]}")
    found = json.loads(child.stdout.splitlines()[-1])
    case = "selective_scan B1 L262,144 D64 N16, the process's peak"
    return row(case, "GiB", found["peak_bytes"] / 2**30, reach="<= 2")


def peak_of_long_scan() -> int:
    """Runs it here; bytes that were resident at most."""
    spec = scan_specs.named("issue")
    sizes = testing.ArgSpec(
        name="long", sizes=LONG, draw=spec.draw, given=spec.given, options=spec.options
    )
    program = jax.jit(bench.forward_and_gradients(scan))
    jax.block_until_ready(program(*draw(selective_scan, sizes)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def draw(op, spec) -> tuple:
    """The cotangent of y and the arrays of a call, in float32."""
    case = testing.draw_case(op, spec, spec.sizes["t"])
    return tuple(jnp.asarray(x) for x in (case.dy, *case.arrays.values()))


def abstract(op, spec, length: int) -> tuple:
    """The same without numbers."""
    sizes = {**spec.sizes, "t": length}
    letters = testing.letters_of(op)
    names = (*testing.required(op), *spec.given)
    shapes = [tuple(sizes[x] for x in letters[name]) for name in names]
    of_y = tuple(sizes[x] for x in op.axes.results)
    return tuple(jax.ShapeDtypeStruct(shape, np.float32) for shape in (of_y, *shapes))


def least_seconds(op, spec, machine: Device) -> float:
    """The floor of forward and backward, one after the other."""
    parts = (op.cost(**spec.sizes, backward=backward) for backward in (False, True))
    return sum(roofline(cost, machine, dtype="float32", matrix_units=False) for cost in parts)


def title(name: str, spec) -> str:
    sizes = " ".join(
        f"{x}{spec.sizes[y]}" for x, y in zip("BLDN", "bten", strict=True) if y in spec.sizes
    )
    return f"{name} {sizes}, forward + gradients"


def row(case: str, unit: str, measured: float, *, floor=None, reach: str = "") -> dict[str, object]:
    digits = 1 if measured >= 1 else 2
    return {
        "bench": "operators",
        "case": case,
        "measured": round(measured, digits),
        "unit": unit,
        "floor": "" if floor is None else round(floor, 1),
        "to reach": reach,
    }


if __name__ == "__main__":
    print(json.dumps({"peak_bytes": peak_of_long_scan()}))
