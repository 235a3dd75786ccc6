"""chunk_attention: against the library's masked attention and all pairs of chunks at once, memory,
linearity.

Forward and all gradients, float32. `floor` is what the operations and bytes of the call take at the
rates that this machine reaches.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp

from pallas_kernels import chunk_attention
from pallas_kernels.chunk_attention.arg_specs import named
from pallas_kernels.chunk_attention.scores import weigh
from pallas_kernels.core import bench
from pallas_kernels.core.costs import roofline
from pallas_kernels.core.testing import ArgSpec
from seqzoo.eval.bench.operators import abstract, draw


def library(q, k, v, *, window: int):
    """The same by jax.nn: all pairs, those outside the window masked."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=(window - 1, 0))


def at_once(q, k, v, bias, *, chunk: int, score: str = "softmax", causal: bool = True):
    """The chunked form in a few lines: the scores of all chunks in memory, a gathered bias."""
    cut = lambda x: x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
    places = jnp.arange(chunk)
    distance = places - places[:, None]
    seen = (distance <= 0) | (not causal)
    products = jnp.einsum("bnchk,bnshk->bnhcs", cut(q), cut(k))
    scale = q.shape[-1] ** -0.5 if score == "softmax" else 1.0
    weights = weigh(score, products, bias[:, distance + chunk - 1], seen, scale)
    return jnp.einsum("bnhcs,bnshv->bnchv", weights, cut(v)).reshape(v.shape)


def run(quick: bool = False) -> list[dict[str, object]]:
    """Rows: what was measured, its floor on this machine, and the figure to reach."""
    machine = bench.this_machine(rounds=3 if quick else 9)
    rounds = 3 if quick else 9
    rows = []
    for name in ("small",) if quick else ("small", "based_360m"):
        spec = named(name)
        found = bench.take_turns(programs(spec), draw(chunk_attention, spec), rounds=rounds)
        ours, theirs = found["ours"], found["library"]
        cost = functools.partial(chunk_attention.cost, **spec.sizes, **spec.options)
        both = (roofline(cost(backward=b), machine, dtype="float32") for b in (False, True))
        rows += [
            row(f"{name}: {title(spec)}", "ms", 1e3 * ours.median, floor=1e3 * sum(both)),
            row(f"{title(spec)}, all pairs by the library", "ms", 1e3 * theirs.median),
            row(f"{title(spec)}, against it", "x faster", bench.times_faster(theirs, ours)),
        ]
    for name in ("mega_small",) if quick else ("mega_small", "mega_image", "mega_enwik8"):
        rows += chunks(named(name), machine, rounds)
    spec = at_length(32_768)
    _, memory = bench.compile_(programs(spec)["ours"], *abstract(chunk_attention, spec, 32_768))
    rows.append(row(f"{title(spec)}, temporaries", "MB", memory.temp_bytes / 1e6))
    return rows + linear((2048, 4096) if quick else (2048, 4096, 8192, 16_384, 32_768), rounds)


def chunks(spec: ArgSpec, machine, rounds: int) -> list[dict[str, object]]:
    """The chunked form and all pairs at once take turns; the second one's memory too."""
    programs = {
        "ours": bench.forward_and_gradients(functools.partial(chunk_attention, **spec.options)),
        "at once": bench.forward_and_gradients(
            functools.partial(at_once, **spec.options), has_state=False
        ),
    }
    found = bench.take_turns(programs, draw(chunk_attention, spec), rounds=rounds)
    ours, plain = found["ours"], found["at once"]
    cost = functools.partial(chunk_attention.cost, **_axes(spec), **spec.options)
    both = (roofline(cost(backward=b), machine, dtype="float32") for b in (False, True))
    return [
        row(f"{spec.name}: {title(spec)}", "ms", 1e3 * ours.median, floor=1e3 * sum(both)),
        row(f"{title(spec)}, all pairs at once", "ms", 1e3 * plain.median),
        row(f"{title(spec)}, against it", "x faster", bench.times_faster(plain, ours)),
        row(f"{title(spec)}, temporaries", "MB", ours.temp_bytes / 1e6),
        row(f"{title(spec)}, temporaries at once", "MB", plain.temp_bytes / 1e6),
    ]


def _axes(spec: ArgSpec) -> dict[str, int]:
    return {letter: size for letter, size in spec.sizes.items() if letter != "p"}


def linear(lengths: tuple[int, ...], rounds: int) -> list[dict[str, object]]:
    """Time against length, and the ratio at each doubling; the lengths take turns."""

    def beginning(t):
        whole = programs(at_length(t))["ours"]
        return lambda *arrays: whole(*(x[:, :t] for x in arrays))

    longest = draw(chunk_attention, at_length(max(lengths)))
    found = bench.take_turns({str(t): beginning(t) for t in lengths}, longest, rounds=rounds)
    rows = [row(title(at_length(t)), "ms", 1e3 * found[str(t)].median) for t in lengths]
    for short, long in itertools.pairwise(lengths):
        ratio = bench.times_faster(found[str(long)], found[str(short)])
        case = f"{title(at_length(long))}, by half the length"
        rows.append(row(case, "x", ratio, reach="<= 2.2"))
    return rows


def programs(spec: ArgSpec) -> dict:
    """Forward and all gradients, ours and the library's."""
    ours = functools.partial(chunk_attention, **spec.options)
    theirs = functools.partial(library, **spec.options)
    return {
        "ours": bench.forward_and_gradients(ours),
        "library": bench.forward_and_gradients(theirs, has_state=False),
    }


def at_length(t: int) -> ArgSpec:
    """One sequence of the small shape at another length."""
    spec = named("small")
    return dataclasses.replace(spec, sizes={**spec.sizes, "b": 1, "t": t})


def title(spec: ArgSpec) -> str:
    b, t, h, k = (spec.sizes[x] for x in "bthk")
    said = ", ".join(f"{name} {value}" for name, value in spec.options.items())
    return f"chunk_attention B{b} L{t:,} H{h} k{k} {said}"


def row(case: str, unit: str, measured: float, *, floor=None, reach: str = "") -> dict[str, object]:
    return {
        "bench": "chunk_attention",
        "case": case,
        "measured": round(measured, 1 if measured >= 10 else 2),
        "unit": unit,
        "floor": "" if floor is None else round(floor, 1),
        "to reach": reach,
    }
