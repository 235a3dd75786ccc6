"""The forward walk of the gated delta rule: states from chunk to chunk, kept in registers.

A block of threads has 64 columns of the values, of one head and one memory of a row.
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
from pallas_kernels.gated_delta_rule.gpu_parts import BETA, GATES


class Walked(NamedTuple):
    """What the walk gives.

    Attributes:
        y: `[b t h v]`, or None.
        states: after the last chunks, float32 `[b m h k v]`.
        starts: before each chunk, bfloat16 `[b h n k v]`, or None.
        written: X, bfloat16 `[b t h v]`, or None.
    """

    y: Any
    states: Any
    starts: Any
    written: Any


def walk(q, k, v, solved, gates, s, bounds, how: How, *, keep: bool) -> Walked:
    """Walks over all chunks: for y, or (`keep`) for what the backward pass needs.

    Args:
        q, k: bfloat16 `[b t h k]`.
        v: bfloat16 `[b t h v]`.
        solved: T, bfloat16 `[b h n c c]`.
        gates: float32 `[b h n 6 c]`.
        s: the first states, float32 `[b m h k v]`.
        bounds: int32 `[b m 2]`, first chunk of each memory and the one after its last; None = there
            is one memory.
        how: what is fixed.
        keep: starts and written, and no y.
    """
    b, t, h, width = k.shape
    m, values, n = s.shape[1], v.shape[-1], gates.shape[2]
    like = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    kept = [like((b, h, n, width, values)), like(v.shape)]
    found = gpu.kernel_call(
        functools.partial(_body, how=how, keep=keep, memories=bounds is not None),
        name="gated_delta_rule_states" if keep else "gated_delta_rule_forward",
        config=how.config,
        out_type=[like(s.shape, jnp.float32), *(kept if keep else [like(v.shape)])],
        grid=(b * m, h, values // BLOCK),
        grid_names=("rows", "heads", "columns"),
        num_threads=2,
        thread_name="half",
        scratch_types=dict(
            **({} if keep else dict(q=parts.tile(2, CHUNK, width))),
            k=parts.tile(2, CHUNK, width),
            v=parts.tile(2, CHUNK, BLOCK),
            solved=parts.tile(2, CHUNK, CHUNK),
            numbers=parts.numbers(2, rows=GATES),
            state=parts.tile(width, BLOCK),
            factors=parts.tile(2 if keep else 3, CHUNK, BLOCK),
            loaded=plgpu.Barrier(num_arrivals=4 if keep else 5, num_barriers=2),
            wrote=plgpu.Barrier(),
            met=plgpu.Barrier(),
            both=plgpu.Barrier(num_arrivals=2),
        ),
    )(*([] if keep else [q]), k, v, solved, gates, s, *([] if bounds is None else [bounds]))
    if keep:
        return Walked(None, *found)
    return Walked(found[1], found[0], None, None)


def _body(*given, how: How, keep: bool, memories: bool, **scratch):
    """Half 0 finds what tokens write, half 1 reads; each keeps half of the state's rows."""
    refs = Refs(given)
    q = refs.take(not keep)
    k, v, solved, gates, s = refs.several(5)
    bounds, after = refs.take(memories), refs.take()
    results = refs.several(2 if keep else 1)
    m, width = s.shape[1], k.shape[-1]
    index, head, place = (lax.axis_index(x) for x in ("rows", "heads", "columns"))
    half = lax.axis_index("half")
    row, memory, column = index // m, index % m, place * BLOCK
    state_s, factors = scratch["state"], scratch["factors"]
    loaded, wrote, met, both = (scratch[x] for x in ("loaded", "wrote", "met", "both"))
    first, last = parts.span(bounds, row, memory, gates.shape[2])
    own = [pl.ds(half * (width // 2) + r * BLOCK, BLOCK) for r in range(width // 2 // BLOCK)]
    of_state = lambda rows: (row, memory, head, rows, pl.ds(column, BLOCK))

    def fetch(chunk):
        slot = chunk % 2
        at = lambda ref, start, size: parts.tokens_at(ref, row, chunk, head, start, size)
        sources = dict(k=at(k, 0, width), v=at(v, column, BLOCK))
        if q is not None:
            sources["q"] = at(q, 0, width)
        sources |= dict(solved=solved.at[row, head, chunk], numbers=gates.at[row, head, chunk])
        for name, source in sources.items():
            plgpu.copy_gmem_to_smem(source, scratch[name].at[slot], loaded.at[slot])

    def write(slot):
        """X, and d X for the state after."""
        k_s, numbers = scratch["k"].at[slot], scratch["numbers"].at[slot]
        stands = parts.product(how, k_s, state_s)
        tokens = scratch["v"][slot].astype(jnp.float32)
        missing = down(numbers[BETA]) * (tokens - down(numbers[START]) * stands)
        factors[0] = bfloat16(missing)
        plgpu.commit_smem()
        written = parts.product(how, scratch["solved"].at[slot], factors.at[0])
        factors[0] = bfloat16(down(numbers[END]) * written)
        factors[1] = bfloat16(written)
        plgpu.commit_smem()
        plgpu.barrier_arrive(wrote)

    def read(slot, chunk):
        """y."""
        q_s, k_s, numbers = (scratch[x].at[slot] for x in ("q", "k", "numbers"))
        scores = parts.product(how, q_s, Turned(k_s)) * parts.faded(numbers)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's y is out
        factors[2] = bfloat16(how.scale * scores)
        plgpu.commit_smem()
        y = how.scale * down(numbers[START]) * parts.product(how, q_s, state_s)
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(wrote)
        y = y + parts.product(how, factors.at[2], factors.at[1])
        factors[2] = bfloat16(y)
        plgpu.commit_smem()
        where = parts.tokens_at(results[0], row, chunk, head, column, BLOCK)
        plgpu.copy_smem_to_gmem(factors.at[2], where)

    def hand_out(chunk):
        """The state before, and X."""
        where = results[0].at[row, head, chunk, :, pl.ds(column, BLOCK)]
        plgpu.copy_smem_to_gmem(state_s, where)
        plgpu.barrier_wait(wrote)
        where = parts.tokens_at(results[1], row, chunk, head, column, BLOCK)
        plgpu.copy_smem_to_gmem(factors.at[1], where)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(met)

    def step(chunk, states):
        slot = chunk % 2
        plgpu.barrier_wait(loaded.at[slot])

        @pl.when(half == 0)
        def _():
            pl.when(chunk + 1 < last)(lambda: fetch(chunk + 1))
            write(slot)
            plgpu.barrier_wait(met)  # the other half has read the state

        pl.when(half == 1)(lambda: hand_out(chunk) if keep else read(slot, chunk))
        k_s, through = scratch["k"].at[slot], scratch["numbers"][slot, THROUGH, 0]
        after = []
        for rows, before in zip(own, states, strict=True):
            brought = parts.product(how, Turned(k_s.at[:, rows]), factors.at[0])
            after.append(through * before + brought)
            # Here, so that no two blocks' products are waiting in registers.
            state_s[rows, :] = bfloat16(after[-1])
        together()
        return tuple(after)

    def together():
        plgpu.commit_smem()
        plgpu.barrier_arrive(both)
        plgpu.barrier_wait(both)

    pl.when((half == 0) & (first < last))(lambda: fetch(first))
    states = tuple(parts.from_global(how, s.at[of_state(rows)]) for rows in own)
    for rows, state in zip(own, states, strict=True):
        state_s[rows, :] = bfloat16(state)
    together()
    states = lax.fori_loop(first, last, step, states)
    for rows, state in zip(own, states, strict=True):
        after[of_state(rows)] = state
    plgpu.wait_smem_to_gmem(0)
