"""The backward walk of the gated delta rule: gradients of states from the last chunk to the first.

As the forward walk (gpu_walk.py): a block of threads has 64 columns of the values.
"""

import functools
from typing import NamedTuple

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


class WalkedBack(NamedTuple):
    """What the backward walk gives.

    Attributes:
        ds: gradient of the first states, float32 `[b m h k v]`.
        dends: of the state after each chunk, bfloat16 `[b h n k v]`.
        dmissing: dR, of what T is multiplied with, bfloat16 `[b t h v]`.
        dv: bfloat16 `[b t h v]`.
        by_values: sums over columns of dR o V, float32 `[b h n v/64 64]`.
    """

    ds: jax.Array
    dends: jax.Array
    dmissing: jax.Array
    dv: jax.Array
    by_values: jax.Array


def walk_back(q, k, v, dy, solved, gates, ds, bounds, how: How) -> WalkedBack:
    """Takes the gradient of the last states back through all chunks.

    Args:
        q, k: bfloat16 `[b t h k]`.
        v, dy: bfloat16 `[b t h v]`.
        solved: T, bfloat16 `[b h n c c]`.
        gates: float32 `[b h n 6 c]`.
        ds: of the last states, float32 `[b m h k v]`.
        bounds: int32 `[b m 2]`, first chunk of each memory and the one after its last; None = there
            is one memory.
        how: what is fixed.
    """
    b, t, h, width = k.shape
    m, values, n = ds.shape[1], v.shape[-1], gates.shape[2]
    like = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    found = gpu.kernel_call(
        functools.partial(_body, how=how, memories=bounds is not None),
        name="gated_delta_rule_states_back",
        config=how.config,
        out_type=[
            like(ds.shape, jnp.float32),
            like((b, h, n, width, values)),
            like(v.shape),
            like(v.shape),
            like((b, h, n, values // BLOCK, CHUNK), jnp.float32),
        ],
        grid=(b * m, h, values // BLOCK),
        grid_names=("rows", "heads", "columns"),
        num_threads=2,
        thread_name="half",
        scratch_types=dict(
            q=parts.tile(2, CHUNK, width),
            k=parts.tile(2, CHUNK, width),
            v=parts.tile(CHUNK, BLOCK),
            dy=parts.tile(CHUNK, BLOCK),
            solved=parts.tile(CHUNK, CHUNK),
            numbers=parts.numbers(2, rows=GATES),
            state=parts.tile(1, width, BLOCK),
            factors=parts.tile(4, CHUNK, BLOCK),
            sums=plgpu.SMEM((CHUNK,), jnp.float32),
            loaded=plgpu.Barrier(num_arrivals=3),
            keys=plgpu.Barrier(num_arrivals=3, num_barriers=2),
            read=plgpu.Barrier(),
            wrote=plgpu.Barrier(),
            met=plgpu.Barrier(),
            both=plgpu.Barrier(num_arrivals=2),
        ),
    )(q, k, v, dy, solved, gates, ds, *([] if bounds is None else [bounds]))
    return WalkedBack(*found)


# Places of factors: of y's gradient, what reads X (then dR), dX (then what the state before gets),
# dv.
_READ, _SCORES, _WRITTEN, _VALUES = range(4)
_MISSING = _SCORES


def _body(*given, how: How, memories: bool, **scratch):
    """Half 0 goes back through X, half 1 through y; each keeps half of the state's rows."""
    refs = Refs(given)
    q, k, v, dy, solved, gates, dlast = refs.several(7)
    bounds = refs.take(memories)
    dfirst, dends, dmissing, dv, by_values = refs.several(5)
    m, width = dlast.shape[1], k.shape[-1]
    index, head, place = (lax.axis_index(x) for x in ("rows", "heads", "columns"))
    half = lax.axis_index("half")
    row, memory, column = index // m, index % m, place * BLOCK
    state_s, factors = scratch["state"], scratch["factors"]
    loaded, keys, both = (scratch[x] for x in ("loaded", "keys", "both"))
    first, last = parts.span(bounds, row, memory, gates.shape[2])
    own = [pl.ds(half * (width // 2) + r * BLOCK, BLOCK) for r in range(width // 2 // BLOCK)]
    of_state = lambda rows: (row, memory, head, rows, pl.ds(column, BLOCK))
    of_values = lambda ref, chunk: parts.tokens_at(ref, row, chunk, head, column, BLOCK)

    def fetch(chunk):
        """What half 0 is done with early."""
        sources = dict(
            v=of_values(v, chunk), dy=of_values(dy, chunk), solved=solved.at[row, head, chunk]
        )
        for name, source in sources.items():
            plgpu.copy_gmem_to_smem(source, scratch[name], loaded)

    def fetch_keys(chunk):
        slot = chunk % 2
        sources = {
            x: parts.tokens_at(ref, row, chunk, head, 0, width) for x, ref in (("q", q), ("k", k))
        }
        for name, source in (sources | dict(numbers=gates.at[row, head, chunk])).items():
            plgpu.copy_gmem_to_smem(source, scratch[name].at[slot], keys.at[slot])

    def back_through_written(slot, chunk, zero):
        """dX, dR, and what the state before gets of them."""
        numbers = scratch["numbers"].at[slot]
        dwritten = down(numbers[END]) * parts.product(
            how, scratch["k"].at[slot + zero()], state_s.at[zero()]
        )
        plgpu.barrier_wait(scratch["read"])
        dwritten = dwritten + parts.product(
            how, Turned(factors.at[zero() + _SCORES]), scratch["dy"]
        )
        factors[zero() + _WRITTEN] = bfloat16(dwritten)
        plgpu.commit_smem()
        found = parts.product(how, Turned(scratch["solved"]), factors.at[zero() + _WRITTEN])
        factors[zero() + _MISSING] = bfloat16(found)
        tokens = scratch["v"][...].astype(jnp.float32)
        scratch["sums"][...] = jnp.sum(found * tokens, axis=1)
        pl.when(chunk > first)(lambda: fetch(chunk - 1))
        found = down(numbers[BETA]) * found
        factors[zero() + _VALUES] = bfloat16(found)
        factors[zero() + _WRITTEN] = bfloat16(-down(numbers[START]) * found)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch["wrote"])
        plgpu.copy_smem_to_gmem(factors.at[zero() + _MISSING], of_values(dmissing, chunk))
        plgpu.copy_smem_to_gmem(factors.at[zero() + _VALUES], of_values(dv, chunk))
        plgpu.copy_smem_to_gmem(scratch["sums"], by_values.at[row, head, chunk, place])

    def back_through_read(slot, chunk, zero):
        """What X and the state get of y's gradient."""
        where = dends.at[row, head, chunk, :, pl.ds(column, BLOCK)]
        plgpu.copy_smem_to_gmem(state_s.at[zero()], where)
        numbers = scratch["numbers"].at[slot]
        scores = (
            how.scale
            * parts.product(
                how, scratch["q"].at[slot + zero()], Turned(scratch["k"].at[slot + zero()])
            )
            * parts.faded(numbers, zero())
        )
        factors[zero() + _SCORES] = bfloat16(scores)
        read = how.scale * down(numbers[START]) * scratch["dy"][...].astype(jnp.float32)
        factors[zero() + _READ] = bfloat16(read)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch["read"])
        plgpu.barrier_wait(scratch["wrote"])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(scratch["met"])

    def step(turn, states):
        chunk = last - 1 - (turn - first)
        slot = chunk % 2
        plgpu.barrier_wait(loaded)
        plgpu.barrier_wait(keys.at[slot])
        zero = lambda: gpu.hidden_zero(scratch["numbers"][slot, THROUGH, 1])

        @pl.when(half == 0)
        def _():
            pl.when(chunk > first)(lambda: fetch_keys(chunk - 1))
            back_through_written(slot, chunk, zero)
            plgpu.barrier_wait(scratch["met"])  # the state is out

        pl.when(half == 1)(lambda: back_through_read(slot, chunk, zero))
        through = scratch["numbers"][slot, THROUGH, 0]
        before = []
        for rows, after in zip(own, states, strict=True):

            def brought(add, rows=rows):
                add(0, Turned(scratch["q"].at[slot + zero(), :, rows]), factors.at[zero() + _READ])
                add(
                    0,
                    Turned(scratch["k"].at[slot + zero(), :, rows]),
                    factors.at[zero() + _WRITTEN],
                )

            found = parts.accumulate(how, [(BLOCK, BLOCK)], brought)[0]
            before.append(through * after + found)
            # Here, so that no two blocks' products are waiting in registers.
            state_s[zero(), rows, :] = bfloat16(before[-1])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what half 0 gave is out
        together()
        return tuple(before)

    def together():
        plgpu.commit_smem()
        plgpu.barrier_arrive(both)
        plgpu.barrier_wait(both)

    @pl.when((half == 0) & (first < last))
    def _():
        fetch(last - 1)
        fetch_keys(last - 1)

    states = tuple(parts.from_global(how, dlast.at[of_state(rows)]) for rows in own)
    for rows, state in zip(own, states, strict=True):
        state_s[0, rows, :] = bfloat16(state)
    together()
    states = lax.fori_loop(first, last, step, states)
    for rows, state in zip(own, states, strict=True):
        dfirst[of_state(rows)] = state
    plgpu.wait_smem_to_gmem(0)
