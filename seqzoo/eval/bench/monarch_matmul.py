"""monarch_matmul: block-diagonal and order-2 products against the dense product of the same widths.

Forward and all gradients, float32; the two of one shape take turns. `floor` is what the operations
and bytes of the call take at the rates that this machine reaches.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import monarch_matmul
from pallas_kernels.core import bench
from pallas_kernels.core.costs import Device, roofline
from pallas_kernels.core.testing import ArgSpec
from pallas_kernels.monarch_matmul.arg_specs import SPECS


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: what was measured, and its floor on this machine."""
    rounds = 3 if quick else 9
    machine = bench.this_machine(rounds=rounds)
    return [
        row
        for spec in SPECS
        if "bench" in spec.tags
        for row in against_dense(spec, machine, rounds)
    ]


def against_dense(spec: ArgSpec, machine: Device, rounds: int) -> list[dict[str, object]]:
    """One shape, and a dense matrix between as many channels."""
    x, *factors = draw(spec)
    d_out = jax.eval_shape(monarch_matmul, x, *factors).shape[-1]
    rng = np.random.default_rng(1)
    dense = jnp.asarray(rng.normal(size=(x.shape[-1], d_out)), jnp.float32)
    dy = jnp.asarray(rng.normal(size=(*x.shape[:2], d_out)), jnp.float32)
    ours = bench.forward_and_gradients(monarch_matmul, has_state=False)
    plain = bench.forward_and_gradients(lambda x, w: x @ w, has_state=False)
    programs = {
        "structured": lambda dy, x, dense, *factors: ours(dy, x, *factors),
        "dense": lambda dy, x, dense, *factors: plain(dy, x, dense),
    }
    found = bench.take_turns(programs, (dy, x, dense, *factors), rounds=rounds)
    sizes = {letter: n for letter, n in spec.sizes.items() if letter != "n"}
    costs = (monarch_matmul.cost(**sizes, backward=b) for b in (False, True))
    floor = 1e3 * sum(roofline(cost, machine, dtype="float32") for cost in costs)
    case = f"{spec.name}: {x.shape[-1]:,} to {d_out:,}, {x.shape[0] * x.shape[1]:,} tokens"
    faster = bench.times_faster(found["dense"], found["structured"])
    return [
        _row(case, "ms", 1e3 * found["structured"].median, floor),
        _row(f"{case}, dense", "ms", 1e3 * found["dense"].median),
        _row(f"{case}, against dense", "x faster", faster),
    ]


def draw(spec: ArgSpec) -> tuple[jax.Array, ...]:
    """x and the factors of a call, in float32."""
    rng = np.random.default_rng(0)
    sizes = spec.sizes
    shapes = {"x": "btn", "w1": "kqp"} | ({"w2": "lsr"} if "w2" in spec.given else {})
    return tuple(
        jnp.asarray(spec.draw(name, tuple(sizes[i] for i in letters), rng), jnp.float32)
        for name, letters in shapes.items()
    )


def _row(case: str, unit: str, measured: float, floor: float | None = None) -> dict[str, object]:
    return {
        "bench": "monarch_matmul",
        "case": case,
        "measured": round(measured, 1 if measured >= 10 else 2),
        "unit": unit,
        "floor": "" if floor is None else round(floor, 2),
        "to reach": "",
    }
