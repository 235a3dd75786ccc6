"""neural_memory: the closed form against the one that makes every token's weights.

The materialised form is what automatic differentiation and two associative scans give: a gradient,
a momentum and weights per token. It is run as it is, and with each chunk computed again in the
backward pass. `floor` is what the operations and bytes of a call take at this machine's rates.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import neural_memory
from pallas_kernels.core import bench
from pallas_kernels.core.costs import Device, roofline
from pallas_kernels.core.testing import ArgSpec
from pallas_kernels.neural_memory import Weights, recall
from pallas_kernels.neural_memory.arg_specs import named
from seqzoo.eval.bench.operators import abstract, draw

LENGTHS = (1024, 4096, 16_384)


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: what was measured, its floor on this machine, and the figure to reach."""
    machine = bench.this_machine(rounds=3 if quick else 9)
    rounds = 3 if quick else 9
    uses = ("issue", "small") if quick else ("issue", "small", "titans_340m")
    return [
        *against_materialised(rounds),
        *memory(),
        *(speed(named(name), machine, rounds) for name in uses),
    ]


def materialised(q, k, v, alpha, eta, theta, w_out, w_in, gamma, *, chunk: int, again=False):
    """y `[b t h v]` of one document from its start, the weights of every token made.

    Args:
        q, k, v, alpha, eta, theta, w_out, w_in, gamma: as neural_memory takes them; t is a multiple
            of chunk.
        chunk: tokens per chunk.
        again: compute a chunk again in the backward pass instead of keeping it.
    """

    def loss(weights, k, v):
        return jnp.sum((recall(weights, k[None])[0] - v) ** 2)

    def combine(before, after):
        (a, x), (b, y) = before, after
        return a * b, jax.tree.map(lambda x, y: _wide(b, y) * x + y, x, y)

    def one_chunk(carry, tokens):  # of one head
        w, s = carry
        q, k, v, alpha, eta, theta = tokens
        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(w, k, v)
        steps = jax.tree.map(lambda u: -_wide(theta, u) * u, gradients)
        first = lambda share, start, x: jax.tree.map(
            lambda start, x: x.at[0].add(share[0] * start), start, x
        )
        _, s = jax.lax.associative_scan(combine, (eta, first(eta, s, steps)))
        _, w = jax.lax.associative_scan(combine, (1 - alpha, first(1 - alpha, w, s)))
        y = jax.vmap(lambda w, q: recall(w, q[None])[0])(w, q)
        return jax.tree.map(lambda x: x[-1], (w, s)), y

    step = jax.checkpoint(one_chunk) if again else one_chunk

    def one_head(weights, tokens):
        cut = lambda x: x.reshape(-1, chunk, *x.shape[1:])
        start = (weights, jax.tree.map(jnp.zeros_like, weights))
        _, y = jax.lax.scan(step, start, jax.tree.map(cut, tokens))
        return y.reshape(-1, y.shape[-1])

    heads = jax.vmap(one_head, in_axes=(0, 1), out_axes=1)
    rows = jax.vmap(heads, in_axes=(None, 0))
    return rows(Weights(w_out, w_in, gamma=gamma), (q, k, v, alpha, eta, theta))


def against_materialised(rounds: int) -> list[dict[str, object]]:
    """d 64, m 256, L 1,024: all take turns, forward and all gradients.

    With pauses: hundreds of megabytes are to be given back.
    """
    spec = named("issue")
    chunk = spec.options["chunk"]
    forms = {
        "closed form": functools.partial(closed, chunk=chunk),
        "materialised": functools.partial(materialised, chunk=chunk),
        "materialised, again": functools.partial(materialised, chunk=chunk, again=True),
    }
    programs = {k: bench.forward_and_gradients(f, has_state=False) for k, f in forms.items()}
    found = bench.take_turns(programs, draw(neural_memory, spec), rounds=rounds, pause=0.2)
    case = f"{title(spec)}, forward + gradients"
    rows = [row(f"{case}, {name}", "ms", 1e3 * x.median) for name, x in found.items()]
    rows += [
        row(f"{case}, {name}, temporaries", "MB", x.temp_bytes / 1e6) for name, x in found.items()
    ]
    ours, theirs = found["closed form"], found["materialised"]
    faster, smaller = bench.times_faster(theirs, ours), theirs.temp_bytes / ours.temp_bytes
    return [
        *rows,
        row(f"{case}, closed against materialised", "x faster", faster, reach=">= 5"),
        row(f"{case}, closed against materialised", "x smaller", smaller, reach=">= 10"),
    ]


def closed(q, k, v, alpha, eta, theta, w_out, w_in, gamma, *, chunk: int):
    """neural_memory with the arguments of `materialised`; y alone."""
    tokens = (q, k, v, alpha, eta, theta)
    return neural_memory(*tokens, w_out=w_out, w_in=w_in, gamma=gamma, chunk=chunk)[0]


def memory() -> list[dict[str, object]]:
    """Temporaries against length, from the compiler; nothing is run.

    To reach: two states (weights and momentum) and 20 numbers per channel for a chunk of tokens.
    """
    rows = []
    for t in LENGTHS:
        spec = named("issue")
        program = bench.forward_and_gradients(
            functools.partial(closed, chunk=spec.options["chunk"]), has_state=False
        )
        _, found = bench.compile_(program, *abstract(neural_memory, spec, t))
        b, h, k, m = (spec.sizes[x] for x in "bhkm")
        allowed = 4 * b * h * (t / spec.options["chunk"] * 2 * 2 * k * m + 20 * t * k) / 1e6 + 5
        case = f"{title(spec, t)}, forward + gradients, temporaries"
        rows.append(row(case, "MB", found.temp_bytes / 1e6, reach=f"<= {allowed:.0f}"))
    return rows


def speed(spec: ArgSpec, machine: Device, rounds: int) -> dict[str, object]:
    """Forward and all gradients, against the machine's floor."""
    chunk = spec.options["chunk"]
    program = bench.forward_and_gradients(functools.partial(closed, chunk=chunk), has_state=False)
    found = bench.take_turns({"": program}, draw(neural_memory, spec), rounds=rounds)[""]
    costs = (
        neural_memory.cost(**spec.sizes, chunk=chunk, backward=b)  # type: ignore[attr-defined]
        for b in (False, True)
    )
    floor = 1e3 * sum(roofline(cost, machine, dtype="float32") for cost in costs)
    case = f"{spec.name}: {title(spec)}, forward + gradients"
    return row(case, "ms", 1e3 * found.median, floor=floor)


def title(spec: ArgSpec, t: int | None = None) -> str:
    b, h, k, m = (spec.sizes[x] for x in "bhkm")
    t = spec.sizes["t"] if t is None else t
    return f"neural_memory B{b} L{t:,} H{h} d{k} m{m} chunk {spec.options['chunk']}"


def row(case: str, unit: str, measured: float, *, floor=None, reach: str = "") -> dict[str, object]:
    return {
        "bench": "neural_memory",
        "case": case,
        "measured": round(measured, 1 if measured >= 10 else 2),
        "unit": unit,
        "floor": "" if floor is None else round(floor, 1),
        "to reach": reach,
    }


def _wide(share, x):
    """`[t]` beside `[t ...]`."""
    return share.reshape(share.shape + (1,) * (x.ndim - share.ndim))
