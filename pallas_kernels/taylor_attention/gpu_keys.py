"""taylor_attention's backward kernel for keys and values: it walks back, as states' gradients do.

With do1 = [do, total] as in gpu_queries.py, r = q.k, dS the gradient of the state after a chunk:

    ds = tril(do1 v1^T) (scale + scale^2 r)        dk = ds^T q + pull(v1 dS^T)
    dv = w^T do1 + m(k) dS                         dS <- dS + m(q)^T do1
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
from pallas_kernels.taylor_attention.gpu_queries import add_up, write_divided, write_total
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


def keys_and_values(
    q, k, v, dy, inverse, total, tables, dlast, places, widths: Widths, how: How, *, has_state: bool
):
    """The kernel's call.

    Args:
        q, k, v, tables, places, widths, how: as the forward kernel's.
        dy: `[b t h v]`.
        inverse, total: `[b h t]` float32; None if not normalized.
        dlast: gradient of the state after, `[b h tile 64 v1]` float32, or None for zeros.
        has_state: whether the gradient of the state before is asked for.

    Returns:
        dk `[b t h 16]`, dv `[b t h v]`, and the gradient of the state before (or None).
    """
    (b, _, h, _), tiles = q.shape, widths.tiles
    outputs = dict(
        dk=jax.ShapeDtypeStruct(k.shape, k.dtype), dv=jax.ShapeDtypeStruct(v.shape, v.dtype)
    )
    if has_state:
        shape = (b, h, tiles, ROWS, widths.columns)
        outputs["dinitial"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = launch(
        "taylor_attention_backward_keys",
        _body,
        dict(q=q, k=k, v=v, dy=dy, inverse=inverse, total=total, places=places),
        tables | dict(dlast=dlast),
        outputs,
        buffers(widths, v.dtype),
        warpgroup(v.dtype, how),
        widths,
        how,
        backward=True,
    )
    return found["dk"], found["dv"], found.get("dinitial")


def buffers(widths: Widths, dtype: Any) -> dict[str, Any]:
    """Scratch besides that of arrays along time."""
    n, low = parts_of(dtype), jnp.bfloat16
    return (
        block_buffers(widths, n)
        | share_buffers("dv", widths, dtype)
        | dict(
            q_low=plgpu.SMEM((n, ROWS, KEY), low),
            w=plgpu.SMEM((n, ROWS, ROWS), low),
            do1=plgpu.SMEM((n, ROWS, widths.columns), low),
            part=plgpu.SMEM((widths.tiles, ROWS, KEY), jnp.float32),
            dk_s=plgpu.SMEM((ROWS, KEY), dtype),
        )
    )


def _body(block: Block) -> None:
    walk(block, "dlast", "dinitial", "of_k_s", _one_chunk)


def _one_chunk(i, block: Block, arrays, seen: Seen, dstate):
    at, unit, tile = block.at, block.unit, block.tile
    load = lambda name: unit.split(only(seen.rows(VALID, KEY), unit.load(arrays[name])))
    q = load("q")
    pl.when(tile == 0)(functools.partial(write_values, block, arrays["v"], seen))
    second = min(1, block.least)
    pl.when(tile == second)(functools.partial(_write_sums_gradient, block, arrays, seen))
    pl.when(tile == block.least)(functools.partial(store_parts, at["q_low"], q))
    features = features_of(block, "of_q_s")
    features.write(at["m"].at[tile], q, functools.partial(seen.rows, HEAD), factor=True)
    everyone(at["ready"])

    dstate = update(block, dstate, "do1", seen)

    def dm(cut: slice) -> jax.Array:
        unit = block.fresh().unit
        states = unit.parts(at["state_low"], tile, rows=cut)
        found = unit.product(unit.wide, unit.parts(at["v1"]), states, turn_b=True)
        return only(seen.rows(TAIL, unit.wide), found)

    k = load("k")
    dk = features.pull(k, dm)
    pairs = functools.partial(_pairs, block, k, seen)
    at["part"][tile] = jax.lax.cond(tile == block.least, pairs, lambda dk: dk, dk)
    # Features of keys take the place of those of queries, which only this warpgroup reads.
    features.write(at["m"].at[tile], k, functools.partial(seen.rows, TAIL))
    everyone(at["between"])

    send_share(block, i, "dv", sums(block, "do1", block.widths.share(tile)))

    @pl.when(tile == block.least)
    def _():
        dk = only(seen.rows(VALID, KEY), add_up(block))
        send(at["dk_s"], dk, block.streams.place(at["dk"], i))

    everyone(at["done"])
    pl.when(tile == 0)(functools.partial(block.streams.refill, i))
    lower(block, dstate, "of_k_s")
    return dstate


def _pairs(block: Block, k, seen: Seen, dk):
    """dk with what the pairs of a chunk give to it; and their weights. Keys' tokens are rows."""
    at, scale = block.at, block.how.scale
    for cut in block.unit.cuts:
        unit = block.fresh().unit
        mask = seen.pairs(cut, turned=True)
        queries = unit.parts(at["q_low"], rows=cut)
        r = unit.product(unit.wide, k, queries, turn_b=True)
        unit.store(at["w"], cut, weights(r, mask, scale))
        do1 = unit.parts(at["do1"], rows=cut)
        ds = unit.product(unit.wide, unit.parts(at["v1"]), do1, turn_b=True)
        ds = only(mask, ds * (scale + (scale * scale) * r))
        dk = unit.product(dk, unit.split(ds), queries)
    return dk


def _write_sums_gradient(block: Block, arrays, seen: Seen) -> None:
    """do1 of a chunk."""
    write_divided(block, arrays, seen)
    total = block.unit.by_row(arrays["total"], ONES) if "total" in arrays else None
    write_total(block, total, seen)
