"""The last kernel of the backward pass: gradients of q, k, g and beta, all chunks at once.

A block of threads has 64 columns of the keys, of one head and chunk, and goes over the values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import gpu
from pallas_kernels.gated_delta_rule import gpu_parts as parts
from pallas_kernels.gated_delta_rule.gpu_parts import (
    BETA,
    BLOCK,
    CHUNK,
    END,
    START,
    How,
    Turned,
    bfloat16,
    down,
)

# Rows of sums: over columns of q o dq, k o dk / beta by what is written, k o dk by what is seen of
# k, k o dk by the state after; and over values of S o dS, for each key.
BY_QUERY, BY_WRITTEN, BY_SEEN, BY_END, BY_STATE = range(5)
SUMS = 5


class Gradients(NamedTuple):
    """What the kernel gives.

    Attributes:
        dq, dk: bfloat16 `[b t h k]`.
        sums: float32 `[b h n k/64 5 64]`.
    """

    dq: jax.Array
    dk: jax.Array
    sums: jax.Array


def gradients(q, k, dy, written, dmissing, starts, dends, gates, how: How) -> Gradients:
    """Gradients of q and k, and the sums that those of g and beta are made of.

    Args:
        q, k: bfloat16 `[b t h k]`.
        dy, written, dmissing: gradient of y, X, dR, bfloat16 `[b t h v]`.
        starts, dends: states before chunks, gradients of those after, bfloat16 `[b h n k v]`.
        gates: float32 `[b h n 6 c]`.
        how: what is fixed.
    """
    (b, _, h, width), n = k.shape, gates.shape[2]
    like = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    blocks = width // BLOCK
    found = gpu.kernel_call(
        lambda *refs, **scratch: _body(*refs, how=how, scratch=scratch),
        name="gated_delta_rule_gradients",
        config=how.config,
        out_type=[
            *(like(q.shape), like(k.shape)),
            like((b, h, n, blocks, SUMS, BLOCK), jnp.float32),
        ],
        grid=(b * h, n, blocks),
        grid_names=("heads", "chunks", "columns"),
        scratch_types=dict(
            values=parts.tile(2, 3, CHUNK, BLOCK),
            states=parts.tile(2, 2, BLOCK, BLOCK),
            keys=parts.tile(2, CHUNK, BLOCK),
            factors=parts.tile(3, CHUNK, CHUNK),
            numbers=parts.gates(),
            sums=plgpu.SMEM((SUMS, BLOCK), jnp.float32),
            loaded=plgpu.Barrier(num_arrivals=5, num_barriers=2),
            first=plgpu.Barrier(num_arrivals=3),
        ),
    )(q, k, dy, written, dmissing, starts, dends, gates)
    return Gradients(*found)


def _body(q, k, dy, written, dmissing, starts, dends, gates, dq, dk, sums, *, how, scratch):
    h = q.shape[2]
    index, chunk, place = (lax.axis_index(x) for x in ("heads", "chunks", "columns"))
    row, head, column = index // h, index % h, place * BLOCK
    values, states, keys, factors = (scratch[x] for x in ("values", "states", "keys", "factors"))
    numbers = scratch["numbers"]
    of_keys = lambda ref: parts.tokens_at(ref, row, chunk, head, column, BLOCK)
    steps = dy.shape[-1] // BLOCK

    def fetch(step):
        slot, lanes = step % 2, step * BLOCK
        for i, ref in enumerate((dy, written, dmissing)):
            source = parts.tokens_at(ref, row, chunk, head, lanes, BLOCK)
            plgpu.copy_gmem_to_smem(source, values.at[slot, i], scratch["loaded"].at[slot])
        for i, ref in enumerate((starts, dends)):
            source = ref.at[row, head, chunk, pl.ds(column, BLOCK), pl.ds(lanes, BLOCK)]
            plgpu.copy_gmem_to_smem(source, states.at[slot, i], scratch["loaded"].at[slot])

    fetch(0)
    plgpu.copy_gmem_to_smem(of_keys(q), keys.at[0], scratch["first"])
    plgpu.copy_gmem_to_smem(of_keys(k), keys.at[1], scratch["first"])
    plgpu.copy_gmem_to_smem(gates.at[row, head, chunk], numbers, scratch["first"])

    def over_values(add):
        """Sums over values: of scores, of L, and of what q and k got of states."""

        def one(step, by_state):
            slot = step % 2
            pl.when(step + 1 < steps)(lambda: fetch(step + 1))
            plgpu.barrier_wait(scratch["loaded"].at[slot])
            dy_s, written_s, dmissing_s = (values.at[slot, i] for i in range(3))
            before, after = states.at[slot, 0], states.at[slot, 1]
            add(0, dy_s, Turned(written_s))
            add(1, dmissing_s, Turned(written_s))
            add(2, dy_s, Turned(before))
            add(3, dmissing_s, Turned(before))
            add(4, written_s, Turned(after))
            products = before[...].astype(jnp.float32) * after[...].astype(jnp.float32)
            parts.products_done(how)
            return by_state + jnp.sum(products, axis=1)

        return (parts.loop(how, steps, one, jnp.zeros((BLOCK,), jnp.float32)),)

    square = (CHUNK, CHUNK)
    dscores, dlower, of_query, of_missing, of_end, by_state = parts.accumulate(
        how, [square] * 5, over_values
    )
    rows = scratch["sums"]
    rows[BY_STATE] = by_state
    plgpu.barrier_wait(scratch["first"])
    dscores = how.scale * dscores * parts.faded(numbers)
    factors[0] = bfloat16(dscores)
    dlower = -dlower * parts.faded(numbers, strictly=True)
    factors[1] = bfloat16(dlower)
    factors[2] = bfloat16(down(numbers[BETA]) * dlower)
    plgpu.commit_smem()

    tokens = lambda i: keys[i].astype(jnp.float32)
    total = lambda x: jnp.sum(x, axis=1)
    found = how.scale * down(numbers[START]) * of_query
    found = found + parts.product(how, factors.at[0], keys.at[1])
    rows[BY_QUERY] = total(found * tokens(0))
    values[0, 0] = bfloat16(found)
    by_written = parts.product(how, factors.at[1], keys.at[1]) - down(numbers[START]) * of_missing
    rows[BY_WRITTEN] = total(by_written * tokens(1))
    of_end = down(numbers[END]) * of_end
    rows[BY_END] = total(of_end * tokens(1))

    def seen(add):
        add(0, Turned(factors.at[0]), keys.at[0])
        add(0, Turned(factors.at[2]), keys.at[1])

    found = of_end + parts.accumulate(how, [square], seen)[0]
    rows[BY_SEEN] = total(found * tokens(1))
    values[0, 1] = bfloat16(found + down(numbers[BETA]) * by_written)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values.at[0, 0], of_keys(dq))
    plgpu.copy_smem_to_gmem(values.at[0, 1], of_keys(dk))
    plgpu.copy_smem_to_gmem(rows, sums.at[row, head, chunk, place])
    plgpu.wait_smem_to_gmem(0)
