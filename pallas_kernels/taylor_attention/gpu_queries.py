"""taylor_attention's backward kernel for queries: it walks forward, as the states do.

With do = dy / (z + eps), total = -sum(do y), do1 = [do, total], r = q.k, and S the state before a
chunk:

    ds = tril(do1 v1^T) (scale + scale^2 r)        dq = ds k + pull(do1 S^T)
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
    pieces,
    send,
    store_parts,
    update,
    walk,
    warpgroup,
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


def queries(q, k, v, dy, y, inverse, tables, state, places, widths: Widths, how: How):
    """The kernel's call.

    Args:
        q, k, v, tables, state, places, widths, how: as the forward kernel's.
        dy: `[b t h v]`.
        y, inverse: what that gave; None if not normalized.

    Returns:
        dq `[b t h 16]`, and total `[b h t]` float32 (None if not normalized).
    """
    b, t, h, _ = q.shape
    outputs = dict(dq=jax.ShapeDtypeStruct(q.shape, q.dtype))
    if how.normalize:
        outputs["total"] = jax.ShapeDtypeStruct((b, h, t), jnp.float32)
    found = launch(
        "taylor_attention_backward_queries",
        _body,
        dict(q=q, k=k, v=v, dy=dy, y=y, inverse=inverse, places=places),
        tables | dict(initial=state),
        outputs,
        buffers(widths, v.dtype),
        warpgroup(v.dtype, how, wide=32 if widths.columns <= 96 else 16),
        widths,
        how,
    )
    return found["dq"], found.get("total")


def buffers(widths: Widths, dtype: Any) -> dict[str, Any]:
    """Scratch besides that of arrays along time."""
    n, low = parts_of(dtype), jnp.bfloat16
    return block_buffers(widths, n) | dict(
        k_low=plgpu.SMEM((n, ROWS, KEY), low),
        do1=plgpu.SMEM((n, ROWS, widths.columns), low),
        part=plgpu.SMEM((widths.tiles, ROWS, KEY), jnp.float32),
        dq_s=plgpu.SMEM((ROWS, KEY), dtype),
        total_s=plgpu.SMEM((ROWS,), jnp.float32),
    )


def _body(block: Block) -> None:
    walk(block, "initial", "last", "of_q_s", _one_chunk)


def _one_chunk(i, block: Block, arrays, seen: Seen, state):
    at, unit, tile = block.at, block.unit, block.tile
    q = unit.split(unit.load(arrays["q"]))
    k = unit.split(only(seen.rows(VALID, KEY), unit.load(arrays["k"])))
    pl.when(tile == 0)(functools.partial(write_values, block, arrays["v"], seen))
    second = min(1, block.least)
    pl.when(tile == second)(functools.partial(_write_sums_gradient, i, block, arrays, seen))
    pl.when(tile == block.least)(functools.partial(store_parts, at["k_low"], k))
    features = features_of(block, "of_k_s")
    features.write(at["m"].at[tile], k, functools.partial(seen.rows, TAIL), factor=True)
    everyone(at["ready"])

    def dm(cut: slice) -> jax.Array:
        unit = block.fresh().unit
        states = unit.parts(at["state_low"], tile, rows=cut)
        found = unit.product(unit.wide, unit.parts(at["do1"]), states, turn_b=True)
        return only(seen.rows(HEAD, unit.wide), found)

    dq = features.pull(q, dm)
    pairs = functools.partial(_pairs, block, q, seen)
    at["part"][tile] = jax.lax.cond(tile == block.least, pairs, lambda dq: dq, dq)
    state = update(block, state, "v1", seen)
    everyone(at["between"])

    @pl.when(tile == 0)
    def _():
        dq = only(seen.rows(VALID, KEY), add_up(block))
        send(at["dq_s"], dq, block.streams.place(at["dq"], i))
        block.streams.refill(i)

    lower(block, state, "of_q_s")
    return state


def _pairs(block: Block, q, seen: Seen, dq):
    """dq with what the pairs of a chunk give to it."""
    at, scale = block.at, block.how.scale
    for cut in block.unit.cuts:
        unit = block.fresh().unit
        keys = unit.parts(at["k_low"], rows=cut)
        r = unit.product(unit.wide, q, keys, turn_b=True)
        v1 = unit.parts(at["v1"], rows=cut)
        ds = unit.product(unit.wide, unit.parts(at["do1"]), v1, turn_b=True)
        ds = only(seen.pairs(cut), ds * (scale + (scale * scale) * r))
        dq = unit.product(dq, unit.split(ds), keys)
    return dq


def add_up(block: Block) -> jax.Array:
    """The sum of the warpgroups' parts."""
    parts = [block.unit.load(block.at["part"].at[j]) for j in range(block.widths.tiles)]
    return functools.reduce(jnp.add, parts)


def _write_sums_gradient(i, block: Block, arrays, seen: Seen) -> None:
    """do1 of a chunk, from y; and total, for the other kernel."""
    total = write_divided(block, arrays, seen)
    if total is not None:
        send(block.at["total_s"], total, block.streams.place(block.at["total"], i))
        total = block.unit.spread(total, ONES)
    write_total(block, total, seen)


def write_divided(block: Block, arrays, seen: Seen) -> jax.Array | None:
    """Writes do of a chunk, 0 at padding; gives total `[64]` if there is y."""
    unit, total = block.unit, None
    for here in pieces(block.widths.values):
        do = unit.load(arrays["dy"].at[:, here])
        n = do.shape[1]
        do = only(seen.rows(VALID, n), do)
        if "inverse" in arrays:
            do = do * unit.by_row(arrays["inverse"], n)
        unit.store(block.at["do1"], here, do)
        if "y" in arrays:
            y = only(seen.rows(VALID, n), unit.load(arrays["y"].at[:, here]))
            do = unit.rounded(do) if unit.n_parts == 1 else do
            part = jnp.sum(do * y, axis=1)
            total = -part if total is None else total - part
    return total


def write_total(block: Block, total: jax.Array | None, seen: Seen) -> None:
    """Writes total `[64 16]` behind do, in two parts.

    Two for twice the digits: do.v and total cancel where a token sees little more than itself.
    """
    unit, n = block.unit, block.widths.values
    total = unit.zeros(ONES) if total is None else total
    rounded = unit.rounded(total)
    rest = jnp.where(seen.first(2, ONES), total - rounded, jnp.zeros_like(total))
    total = jnp.where(seen.first(1, ONES), rounded, rest)
    unit.store(block.at["do1"], slice(n, n + ONES), total)
