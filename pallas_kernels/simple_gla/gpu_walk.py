"""The walk of simple_gla's GPU kernels: states from chunk to chunk, kept in registers.

A block of threads has 64 columns of the values, of one head and one memory of a row. The gradient
goes back by the same walk: with the time turned round, k and q, the decays from the start and to
the end change places, and what the gradient of y was gives that of v.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import gpu
from pallas_kernels.core import gpu_chunks as parts
from pallas_kernels.core.gpu_chunks import (
    BLOCK,
    CHUNK,
    END,
    START,
    THROUGH,
    How,
    Turned,
    bfloat16,
    down,
)
from pallas_kernels.core.tpu_parts import Refs

_MOST_ROWS = 128  # of a state, in one warpgroup's registers


class Walked(NamedTuple):
    """What a walk gives.

    Attributes:
        read: what the states gave, bfloat16 `[b t h v]`: y, or on the way back dv; None if nobody
            asked.
        states: after the last chunk of the way, float32 `[b m h k v]`.
        kept: before each chunk on the way, bfloat16 `[b h n k v]`, or None.
    """

    read: Any
    states: Any
    kept: Any


class Ready(NamedTuple):
    """Instead of numbers of chunks: q and k have their decays in them (gla).

    Attributes:
        pairs: what of token j token i sees, bfloat16 `[b h n c c]`.
        through: decay of each row of a state, float32 `[b h n k]`.
    """

    pairs: Any
    through: Any


class Way(NamedTuple):
    """How a walk goes.

    Attributes:
        name: of the kernel.
        back: from the last chunk to the first.
        reads: whether what states give is asked for.
        keep: whether the states before chunks are.
    """

    name: str
    back: bool = False
    reads: bool = True
    keep: bool = False


def walk(q, k, values, gates, s, bounds, how: How, way: Way) -> Walked:
    """Walks over all chunks.

    Args:
        q: bfloat16 `[b t g k]`; only k's where nothing is read.
        k: bfloat16 `[b t g k]`.
        values: v, on the way back the gradient of y, bfloat16 `[b t h v]`.
        gates: float32 `[b h n 5 c]`, or `Ready`.
        s: the first states of the way, float32 `[b m h k v]`.
        bounds: int32 `[b m 2]`, first chunk of each memory and the one after its last; None = there
            is one memory.
        how: what is fixed.
        way: how it goes.
    """
    (b, _, groups, width), (h, columns) = k.shape, values.shape[2:]
    m, halves = s.shape[1], -(-width // _MOST_ROWS)
    like = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    out = [like(s.shape, jnp.float32)]
    out += [like(values.shape)] if way.reads else []
    out += [like((b, h, k.shape[1] // CHUNK, width, columns))] if way.keep else []
    # On the way back states are written by q and read by k.
    reader, writer = (k, q) if way.back else (q, k)
    given: dict[str, Any] = dict(reader=reader) if way.reads else {}
    scratch: dict[str, Any] = {x: parts.tile(2, CHUNK, width) for x in (*given, "writer")}
    given |= dict(writer=writer, values=values)
    ready = isinstance(gates, Ready)
    if ready:
        given |= dict(through=gates.through) | (dict(pairs=gates.pairs) if way.reads else {})
        scratch |= dict(through=plgpu.SMEM((2, width), jnp.float32))
        scratch |= dict(pairs=parts.tile(2, CHUNK, CHUNK)) if way.reads else {}
    else:
        given |= dict(numbers=gates)
        scratch |= dict(numbers=parts.numbers(2))
    found = gpu.kernel_call(
        functools.partial(_body, list(given), h // groups, how, way, bounds is not None),
        name=way.name,
        config=how.config,
        out_type=out,
        grid=(b * m, h, columns // BLOCK),
        grid_names=("rows", "heads", "columns"),
        num_threads=halves,
        thread_name="half",
        scratch_types=dict(
            **scratch,
            values=parts.tile(2, CHUNK, BLOCK),
            state=parts.tile(width, BLOCK),
            factors=parts.tile(3 if way.reads and not ready else 1, CHUNK, BLOCK),
            loaded=plgpu.Barrier(num_arrivals=len(given), num_barriers=2),
            wrote=plgpu.Barrier(),
            met=plgpu.Barrier(),
            both=plgpu.Barrier(num_arrivals=halves),
        ),
    )(*given.values(), s, *([] if bounds is None else [bounds]))
    states, *rest = found
    read = rest.pop(0) if way.reads else None
    return Walked(read, states, rest[0] if way.keep else None)


# Places of factors: of what tokens bring, of pairs; last comes what is read.
_BROUGHT, _PAIRS = range(2)


def _body(names: list[str], shared: int, how: How, way: Way, memories: bool, *given, **scratch):
    """The first half reads states, the last forms what they are read beside and get; or one both.

    Each keeps its rows of the state.
    """
    refs = Refs(given)
    arrays: dict[str, Any] = {x: refs.take() for x in names}
    s, bounds, last_states = refs.take(), refs.take(memories), refs.take()
    read, kept = refs.take(way.reads), refs.take(way.keep)
    ready = "numbers" not in arrays
    t, width, m = arrays["writer"].shape[1], arrays["writer"].shape[3], s.shape[1]
    index, head, place = (lax.axis_index(x) for x in ("rows", "heads", "columns"))
    half, halves = lax.axis_index("half"), lax.axis_size("half")
    row, memory, column = index // m, index % m, place * BLOCK
    state_s, factors, loaded = (scratch[x] for x in ("state", "factors", "loaded"))
    out = factors.at[factors.shape[0] - 1]  # for what is read
    first, last = parts.span(bounds, row, memory, t // CHUNK)
    own = [
        pl.ds(half * (width // halves) + r * BLOCK, BLOCK) for r in range(width // halves // BLOCK)
    ]
    of_state = lambda rows: (row, memory, head, rows, pl.ds(column, BLOCK))
    if halves == 1:
        reads = forms = lambda do: do()
    else:
        reads, forms = pl.when(half == 0), pl.when(half == halves - 1)

    def tell(barrier):
        if halves > 1:
            plgpu.barrier_arrive(scratch[barrier])

    def hear(barrier):
        if halves > 1:
            plgpu.barrier_wait(scratch[barrier])

    def fetch(chunk, slot):
        for name, ref in arrays.items():
            if name in ("reader", "writer"):
                source = parts.tokens_at(ref, row, chunk, head // shared, 0, width)
            elif name == "values":
                source = parts.tokens_at(ref, row, chunk, head, column, BLOCK)
            else:
                source = ref.at[row, head, chunk]
            plgpu.copy_gmem_to_smem(source, scratch[name].at[slot], loaded.at[slot])

    def from_start(of):
        return how.scale * down(of[START])

    def form(slot):
        """What tokens bring to the state, and what pairs of tokens give."""
        of = scratch["numbers"].at[slot]
        brings = from_start(of) if way.back else down(of[END])
        factors[_BROUGHT] = bfloat16(brings * scratch["values"][slot].astype(jnp.float32))
        if way.reads:
            q_s, k_s = (scratch[x].at[slot] for x in ("reader", "writer")[:: -1 if way.back else 1])
            pairs = parts.product(how, q_s, Turned(k_s)) * parts.faded(of)
            factors[_PAIRS] = bfloat16(how.scale * pairs)
        plgpu.commit_smem()
        tell("wrote")

    def give(slot, chunk):
        """What is read of the state and of pairs; the state before."""
        if way.keep:
            where = kept.at[row, head, chunk, :, pl.ds(column, BLOCK)]
            plgpu.copy_smem_to_gmem(state_s, where)
        if way.reads:
            reader, values_s = (scratch[x].at[slot] for x in ("reader", "values"))
            turned = lambda pairs: Turned(pairs) if way.back else pairs
            if ready:

                def of_both(add):
                    add(0, reader, state_s)
                    add(0, turned(scratch["pairs"].at[slot]), values_s)

                found = parts.accumulate(how, [(CHUNK, BLOCK)], of_both)[0]
            else:
                of = scratch["numbers"].at[slot]
                found = parts.product(how, reader, state_s)
                found = (down(of[END]) if way.back else from_start(of)) * found
                hear("wrote")
                found = found + parts.product(how, turned(factors.at[_PAIRS]), values_s)
            # The last chunk's is out, and the state.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out[...] = bfloat16(found)
            plgpu.commit_smem()
            where = parts.tokens_at(read, row, chunk, head, column, BLOCK)
            plgpu.copy_smem_to_gmem(out, where)
        else:
            if not ready:
                hear("wrote")
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tell("met")

    def through(slot, rows):
        return (
            down(scratch["through"][slot, rows]) if ready else scratch["numbers"][slot, THROUGH, 0]
        )

    def step(turn, states):
        slot = turn % 2
        chunk = last - 1 - (turn - first) if way.back else turn
        plgpu.barrier_wait(loaded.at[slot])

        beyond = chunk - 1 if way.back else chunk + 1
        forms(lambda: pl.when(turn + 1 < last)(lambda: fetch(beyond, 1 - slot)))
        if not ready:
            forms(lambda: form(slot))
        reads(lambda: give(slot, chunk))
        forms(lambda: hear("met"))  # the other half has read the state
        brings = scratch["values"].at[slot] if ready else factors.at[_BROUGHT]
        after = []
        for rows, before in zip(own, states, strict=True):
            tokens = Turned(scratch["writer"].at[slot, :, rows])
            brought = parts.product(how, tokens, brings)
            after.append(through(slot, rows) * before + brought)
            # Here, so that no two blocks' products are waiting in registers.
            state_s[rows, :] = bfloat16(after[-1])
        together()
        return tuple(after)

    def together():
        plgpu.commit_smem()
        tell("both")
        hear("both")

    @pl.when((half == halves - 1) & (first < last))
    def _():
        fetch(last - 1 if way.back else first, first % 2)

    states = tuple(parts.from_global(how, s.at[of_state(rows)]) for rows in own)
    for rows, state in zip(own, states, strict=True):
        state_s[rows, :] = bfloat16(state)
    together()
    states = lax.fori_loop(first, last, step, states)
    for rows, state in zip(own, states, strict=True):
        last_states[of_state(rows)] = state
    plgpu.wait_smem_to_gmem(0)
