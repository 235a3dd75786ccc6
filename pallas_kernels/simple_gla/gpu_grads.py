"""The last kernel of simple_gla's backward pass: gradients of q, k and g, all chunks at once.

A block of threads has up to 128 columns of the keys, of a chunk and of one head of q and k, and
goes over the heads that share it and over their values.
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
from pallas_kernels.simple_gla import gpu_values
from pallas_kernels.simple_gla.gpu_values import Values

# Rows of sums: over columns of q o dq less k o dk by pairs, q o dq by the state before, k o dk by
# the state after; and over values of S o dS, for each key.
BY_PAIRS, BY_START, BY_END, BY_STATE = range(4)
SUMS = 4


class Gradients(NamedTuple):
    """What the kernel gives.

    Attributes:
        dq, dk: bfloat16 `[b t g k]`.
        sums: float32 `[b h n k/64 4 64]`.
    """

    dq: jax.Array
    dk: jax.Array
    sums: jax.Array


def gradients(q, k, v, dy, starts, dends, gates, how: How) -> Gradients:
    """Gradients of q and k, and the sums that that of g is made of.

    Args:
        q, k: bfloat16 `[b t g k]`.
        v, dy: bfloat16 `[b t h v]`.
        starts, dends: states before chunks, gradients of those after, bfloat16 `[b h n k v]`.
        gates: float32 `[b h n 5 c]`.
        how: what is fixed.
    """
    (b, _, groups, width), h, n = k.shape, v.shape[2], gates.shape[2]
    halves = gpu_values.halves_of(width)
    like = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    found = gpu.kernel_call(
        functools.partial(_body, how=how, halves=halves),
        name="simple_gla_gradients",
        config=how.config,
        out_type=[
            *(like(q.shape), like(k.shape)),
            like((b, h, n, width // BLOCK, SUMS, BLOCK), jnp.float32),
        ],
        grid=(b * groups, n, width // (halves * BLOCK)),
        grid_names=("heads", "chunks", "columns"),
        num_threads=halves,
        thread_name="half",
        scratch_types=dict(
            **gpu_values.scratch(halves),
            keys=parts.tile(halves, 2, CHUNK, BLOCK),
            factors=parts.tile(halves, CHUNK, CHUNK),
            numbers=parts.numbers(2),
            rows=plgpu.SMEM((halves, SUMS, BLOCK), jnp.float32),
            told=plgpu.Barrier(num_barriers=2),
            first=plgpu.Barrier(num_arrivals=2 * halves),
        ),
    )(q, k, v, dy, starts, dends, gates)
    return Gradients(*found)


def _body(q, k, v, dy, starts, dends, gates, dq, dk, sums, *, how: How, halves: int, **scratch):
    """Each half has 64 columns of the keys."""
    groups, shared, half = q.shape[2], v.shape[2] // q.shape[2], lax.axis_index("half")
    index, chunk, place = (lax.axis_index(x) for x in ("heads", "chunks", "columns"))
    row, group = index // groups, index % groups
    at = (row, chunk, group * shared, shared, halves * place)
    values = Values(how, (dy, v, starts, dends), scratch, at, half, halves)
    numbers, keys, rows, factor = (scratch[x] for x in ("numbers", "keys", "rows", "factors"))
    of_keys = lambda ref, n: parts.tokens_at(ref, row, chunk, group, values.columns(n), BLOCK)

    def fetch_numbers(turn):
        source = gates.at[row, group * shared + turn, chunk]
        plgpu.copy_gmem_to_smem(source, numbers.at[turn % 2], scratch["told"].at[turn % 2])

    @pl.when(half == 0)
    def _():
        for n in range(halves):
            for i, ref in enumerate((q, k)):
                plgpu.copy_gmem_to_smem(of_keys(ref, n), keys.at[n, i], scratch["first"])
        fetch_numbers(0)
        values.begin()

    keys, rows, factor = (x.at[half] for x in (keys, rows, factor))
    tokens = lambda i: keys[i].astype(jnp.float32)
    total = lambda x: jnp.sum(x, axis=1)

    def one_head(turn, so_far):
        dq_sum, dk_sum = so_far

        def meanwhile(step):
            more = (half == 0) & (step == 0) & (turn + 1 < shared)
            pl.when(more)(lambda: fetch_numbers(turn + 1))

        by_pairs, of_query, of_end, by_state = values.sums(turn, meanwhile)
        plgpu.barrier_wait(scratch["told"].at[turn % 2])
        of = numbers.at[turn % 2]
        # Read anew: a place that does not hang on the head is found before the loop, and spilled.
        zero = lambda: gpu.hidden_zero(of[THROUGH, 1])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # sums of the head before are out
        rows[BY_STATE] = by_state
        of_query = how.scale * down(of[START]) * of_query
        rows[BY_START] = total(of_query * tokens(zero()))
        dq_sum = dq_sum + of_query
        of_end = down(of[END]) * of_end
        rows[BY_END] = total(of_end * tokens(zero() + 1))
        dk_sum = dk_sum + of_end
        factor[...] = bfloat16(how.scale * by_pairs * parts.faded(of, zero()))
        plgpu.commit_smem()
        # The same rounded factor in both, so that pairs on one side of a token cancel in its sum.
        dq_pairs = parts.product(how, factor, keys.at[zero() + 1])
        seen = total(dq_pairs * tokens(zero()))
        dq_sum = dq_sum + dq_pairs
        dk_pairs = parts.product(how, Turned(factor), keys.at[zero()])
        rows[BY_PAIRS] = seen - total(dk_pairs * tokens(zero() + 1))
        plgpu.commit_smem()
        head = group * shared + turn
        plgpu.copy_smem_to_gmem(rows, sums.at[row, head, chunk, halves * place + half])
        return dq_sum, dk_sum + dk_pairs

    plgpu.barrier_wait(scratch["first"])
    nothing = parts.nothing(how)
    found = lax.fori_loop(0, shared, one_head, (nothing, nothing))
    # All are done with values.
    for i, (x, ref) in enumerate(zip(found, (dq, dk), strict=True)):
        x_s = scratch["values"].at[i, half]
        x_s[...] = bfloat16(x)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_s, of_keys(ref, half))
    plgpu.wait_smem_to_gmem(0)
