"""taylor_attention's forward kernel for Hopper: features and states never leave the chip.

A block of threads has one head of one row and walks over chunks of 64 tokens. Each of its
warpgroups has 64 features, whose part of the state S stays in its registers. For a chunk it makes
its features of keys and with them its part of S, then its features of queries and, when all have,
its columns of the sums (which need all features: there is a second copy of S in shared memory, in
bfloat16):

    o1 = tril(w) v1 + m(q) S         S <- S + m(k)^T v1
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.taylor_attention.gpu_block import (
    Block,
    How,
    block_buffers,
    features_of,
    launch,
    lower,
    send,
    send_share,
    share_buffers,
    store_parts,
    sums,
    update,
    walk,
    warpgroup,
    weights,
    write_values,
)
from pallas_kernels.taylor_attention.gpu_layout import KEY, ONES, Widths
from pallas_kernels.taylor_attention.gpu_warpgroup import (
    HEAD,
    ROWS,
    TAIL,
    VALID,
    Seen,
    everyone,
    only,
    parts_of,
)


def forward(q, k, v, tables, state, places, widths: Widths, how: How, *, save: bool):
    """The kernel's call.

    Args:
        q, k: `[b t h 16]`, t a multiple of 64.
        v: `[b t h v]`, v a multiple of 16.
        tables: see gpu_layout.tables.
        state: `[b h tile 64 v1]` float32, or None for zeros.
        places: int32 `[b t]` or None.
        widths: of the call.
        how: settings.
        save: whether the backward pass will want divisors.

    Returns:
        y `[b t h v]`, the state after, and 1 / (z + eps) `[b h t]` if `save` (and normalized).
    """
    (b, t, h, _), tiles = q.shape, widths.tiles
    outputs = dict(
        y=jax.ShapeDtypeStruct(v.shape, v.dtype),
        last=jax.ShapeDtypeStruct((b, h, tiles, ROWS, widths.columns), jnp.float32),
    )
    if save and how.normalize:
        outputs["inverse"] = jax.ShapeDtypeStruct((b, h, t), jnp.float32)
    found = launch(
        "taylor_attention_forward",
        _body,
        dict(q=q, k=k, v=v, places=places),
        tables | dict(initial=state),
        outputs,
        buffers(widths, v.dtype),
        warpgroup(v.dtype, how),
        widths,
        how,
    )
    return found["y"], found["last"], found.get("inverse")


def buffers(widths: Widths, dtype: Any) -> dict[str, Any]:
    """Scratch besides that of arrays along time."""
    n, low = parts_of(dtype), jnp.bfloat16
    return (
        block_buffers(widths, n)
        | share_buffers("y", widths, dtype)
        | dict(
            k_low=plgpu.SMEM((n, ROWS, KEY), low),
            w=plgpu.SMEM((n, ROWS, ROWS), low),
            inverse_s=plgpu.SMEM((ROWS,), jnp.float32),
        )
    )


def _body(block: Block) -> None:
    walk(block, "initial", "last", "of_q_s", _one_chunk)


def _one_chunk(i, block: Block, arrays, seen: Seen, state):
    at, unit, tile, how = block.at, block.unit, block.tile, block.how
    # What stands at padding stays in its rows of features, sums and weights, which are masked.
    q, k = (unit.split(unit.load(arrays[name])) for name in "qk")
    pl.when(tile == 0)(functools.partial(write_values, block, arrays["v"], seen))
    pl.when(tile == block.least)(functools.partial(_write_weights, block, q, k, seen))
    features = features_of(block, "of_k_s")
    features.write(at["m"].at[tile], k, functools.partial(seen.rows, TAIL), factor=True)
    everyone(at["ready"])

    state = update(block, state, "v1", seen)
    # Features of queries take the place of those of keys, which only this warpgroup reads.
    features.write(at["m"].at[tile], q, functools.partial(seen.rows, HEAD))
    everyone(at["between"])

    y = sums(block, "v1", block.widths.share(tile))
    y = only(seen.rows(VALID, y.shape[1]), y)
    if how.normalize:
        pl.when(tile == block.least)(functools.partial(_write_divisor, i, block, seen))
    everyone(at["done"])

    pl.when(tile == 0)(functools.partial(block.streams.refill, i))
    lower(block, state, "of_q_s")
    if how.normalize:
        y = y * unit.by_row(at["inverse_s"], y.shape[1])
    send_share(block, i, "y", y)
    return state


def _write_weights(block: Block, q, k, seen: Seen) -> None:
    """Weights of the pairs of a chunk."""
    at, unit = block.at, block.unit
    store_parts(at["k_low"], k)
    plgpu.commit_smem()
    for cut in unit.cuts:
        r = unit.product(unit.wide, q, unit.parts(at["k_low"], rows=cut), turn_b=True)
        unit.store(at["w"], cut, weights(r, seen.pairs(cut), block.how.scale))


def _write_divisor(i, block: Block, seen: Seen) -> None:
    """1 / (z + eps), 1 at padding."""
    z = sums(block, "v1", pl.ds(block.widths.values, ONES)) + block.how.eps
    if (valid := seen.rows(VALID, ONES)) is not None:
        z = jnp.where(valid, z, jnp.ones_like(z))
    inverse = 1 / jnp.sum(only(seen.first(1, ONES), z), axis=1)
    buffer = block.at["inverse_s"]
    if "inverse" in block.at:
        send(buffer, inverse, block.streams.place(block.at["inverse"], i))
    else:
        buffer[...] = inverse
