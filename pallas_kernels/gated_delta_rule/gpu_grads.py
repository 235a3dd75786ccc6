"""The last kernel of the backward pass: gradients of q, k, g and beta, all chunks at once.

A block of threads has 128 columns of the keys, of one head and chunk, and goes over the values.
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
from pallas_kernels.core.gpu_chunks import BLOCK, CHUNK, END, START, How, Turned, bfloat16, down
from pallas_kernels.gated_delta_rule.gpu_parts import BETA, GATES

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
    found = gpu.kernel_call(
        functools.partial(_body, how=how),
        name="gated_delta_rule_gradients",
        config=how.config,
        out_type=[
            *(like(q.shape), like(k.shape)),
            like((b, h, n, width // BLOCK, SUMS, BLOCK), jnp.float32),
        ],
        grid=(b * h, n, width // (2 * BLOCK)),
        grid_names=("heads", "chunks", "columns"),
        num_threads=2,
        thread_name="half",
        scratch_types=dict(
            values=parts.tile(2, 3, CHUNK, BLOCK),
            states=parts.tile(2, 2, 2, BLOCK, BLOCK),
            keys=parts.tile(2, 2, CHUNK, BLOCK),
            factors=parts.tile(3, CHUNK, CHUNK),
            numbers=parts.numbers(rows=GATES),
            rows=plgpu.SMEM((2, SUMS, BLOCK), jnp.float32),
            loaded=plgpu.Barrier(num_arrivals=7, num_barriers=2),
            first=plgpu.Barrier(num_arrivals=5),
            both=plgpu.Barrier(num_arrivals=2),
        ),
    )(q, k, dy, written, dmissing, starts, dends, gates)
    return Gradients(*found)


def _body(q, k, dy, written, dmissing, starts, dends, gates, dq, dk, sums, *, how: How, **scratch):
    """Each half has 64 columns of the keys; half 0 finds what pairs got by y, half 1 by L."""
    h, half = q.shape[2], lax.axis_index("half")
    index, chunk, place = (lax.axis_index(x) for x in ("heads", "chunks", "columns"))
    row, head = index // h, index % h
    values, states, factors, numbers = (
        scratch[x] for x in ("values", "states", "factors", "numbers")
    )
    keys, rows = scratch["keys"].at[half], scratch["rows"].at[half]
    steps = dy.shape[-1] // BLOCK
    column = lambda half: (2 * place + half) * BLOCK
    of_keys = lambda ref, half: parts.tokens_at(ref, row, chunk, head, column(half), BLOCK)

    def fetch(step):
        slot, lanes = step % 2, step * BLOCK
        load = lambda source, to: plgpu.copy_gmem_to_smem(source, to, scratch["loaded"].at[slot])
        for i, ref in enumerate((dy, written, dmissing)):
            load(parts.tokens_at(ref, row, chunk, head, lanes, BLOCK), values.at[slot, i])
        for i, ref in enumerate((starts, dends)):
            for n in range(2):
                where = (pl.ds(column(n), BLOCK), pl.ds(lanes, BLOCK))
                load(ref.at[row, head, chunk, *where], states.at[slot, i, n])

    def fetch_first():
        load = lambda source, to: plgpu.copy_gmem_to_smem(source, to, scratch["first"])
        for n in range(2):
            load(of_keys(q, n), scratch["keys"].at[n, 0])
            load(of_keys(k, n), scratch["keys"].at[n, 1])
        load(gates.at[row, head, chunk], numbers)
        fetch(0)

    def together():
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch["both"])
        plgpu.barrier_wait(scratch["both"])

    def over_values(add):
        """Sums over values: of pairs, and of what q and k got of states."""

        def one(step, by_state):
            slot = step % 2
            plgpu.barrier_wait(scratch["loaded"].at[slot])
            dy_s, written_s, dmissing_s = (values.at[slot, i] for i in range(3))
            before, after = states.at[slot, 0, half], states.at[slot, 1, half]
            # dy is beside dR, so that each half finds its sum of pairs by the same products.
            add(0, values.at[slot, 2 * half], Turned(written_s))
            add(1, dy_s, Turned(before))
            add(2, dmissing_s, Turned(before))
            add(3, written_s, Turned(after))
            products = before[...].astype(jnp.float32) * after[...].astype(jnp.float32)
            parts.products_done(how)
            together()
            if (more := step + 2 < steps) is not False:  # the interpreter's steps are numbers
                pl.when((half == 0) & more)(lambda: fetch(step + 2))
            return by_state + jnp.sum(products, axis=1)

        return (parts.loop(how, steps, one, jnp.zeros((BLOCK,), jnp.float32)),)

    @pl.when(half == 0)
    def _():
        fetch_first()
        if steps > 1:
            fetch(1)

    square = (CHUNK, CHUNK)
    of_all = parts.accumulate(how, [square] * 4, over_values)
    by_pairs, of_query, of_missing, of_end, by_state = of_all
    rows[BY_STATE] = by_state
    plgpu.barrier_wait(scratch["first"])

    @pl.when(half == 0)
    def _():
        factors[0] = bfloat16(how.scale * by_pairs * parts.faded(numbers))

    @pl.when(half == 1)
    def _():
        dlower = -by_pairs * parts.faded(numbers, strictly=True)
        factors[1] = bfloat16(dlower)
        factors[2] = bfloat16(down(numbers[BETA]) * dlower)

    together()
    tokens = lambda i: keys[i].astype(jnp.float32)
    total = lambda x: jnp.sum(x, axis=1)
    dq_s, dk_s = values.at[0, half], values.at[1, half]
    found = how.scale * down(numbers[START]) * of_query
    found = found + parts.product(how, factors.at[0], keys.at[1])
    rows[BY_QUERY] = total(found * tokens(0))
    dq_s[...] = bfloat16(found)
    by_written = parts.product(how, factors.at[1], keys.at[1]) - down(numbers[START]) * of_missing
    rows[BY_WRITTEN] = total(by_written * tokens(1))
    of_end = down(numbers[END]) * of_end
    rows[BY_END] = total(of_end * tokens(1))

    def seen(add):
        add(0, Turned(factors.at[0]), keys.at[0])
        add(0, Turned(factors.at[2]), keys.at[1])

    found = of_end + parts.accumulate(how, [square], seen)[0]
    rows[BY_SEEN] = total(found * tokens(1))
    dk_s[...] = bfloat16(found + down(numbers[BETA]) * by_written)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(dq_s, of_keys(dq, half))
    plgpu.copy_smem_to_gmem(dk_s, of_keys(dk, half))
    plgpu.copy_smem_to_gmem(rows, sums.at[row, head, chunk, 2 * place + half])
    plgpu.wait_smem_to_gmem(0)
