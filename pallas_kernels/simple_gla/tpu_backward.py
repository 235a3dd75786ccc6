"""simple_gla's backward kernel for TPUs: blocks of tokens from the last to the first.

A block's arrays come into the vector memory once, and are walked several times (tpu_walks.py): for
the pairs within chunks; forward from the state that was saved before the block; and backward with
the gradient of the state. Heads that share q and k follow each other, and add to one dq and dk.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu_places import seen
from pallas_kernels.core.tpu_tokens import named_call, product_dtype
from pallas_kernels.simple_gla.tpu_chunk import Order, before, ends_gradient
from pallas_kernels.simple_gla.tpu_forward import How
from pallas_kernels.simple_gla.tpu_walks import (
    ROWS,
    down,
    gates,
    gates_gradient,
    scores,
    up,
    values,
)


def backward(arrays, g, saved, places, dy, dlast, how: How, *, fresh: bool):
    """The kernel's call.

    Args:
        arrays: q and k `[b g k t]`, v `[b h v t]`; k and v multiples of 16, t of the block.
        g: `[b h 1 t]` float32, finite.
        saved: the states before each block `[b h n v k]`, or None for a single one after zeros.
        places: `[b 1 t]` or None.
        dy: `[b h v t]`.
        dlast: gradient of the state after, `[b h v k]` float32, or None for zeros.
        how: settings.
        fresh: whether nobody asks for the gradient of the state before.

    Returns:
        Gradients of q, k, v, g and of the state before (or None).
    """
    q, k, v = arrays
    (b, groups, width, t), (_, h, v_width, _) = q.shape, v.shape
    shared, block, chunk = h // groups, how.config.block, how.config.chunk
    steps, dtype = t // block, product_dtype(q, k, v)

    last = steps - 1  # the time axis runs from it to 0
    by_group = pl.BlockSpec((1, 1, width, block), lambda i, j, s, n: (i, j, 0, last - s))
    along = lambda size: pl.BlockSpec(
        (1, 1, size, block), lambda i, j, s, n: (i, j * shared + n, 0, last - s)
    )
    at = lambda when, other: pl.BlockSpec(  # as in the forward kernel
        (1, 1, v_width, width),
        lambda i, j, s, n: (i, j * shared + jnp.where(s == when, n, other), 0, 0),
    )
    inputs = dict(
        q=(q, by_group),
        k=(k, by_group),
        v=(v, along(v_width)),
        g=(g, along(1)),
        dy=(dy, along(v_width)),
        places=(places, pl.BlockSpec((1, 1, block), lambda i, j, s, n: (i, 0, last - s))),
        saved=(
            saved,
            pl.BlockSpec(
                (1, 1, 1, v_width, width),
                lambda i, j, s, n: (i, j * shared + n, last - s, 0, 0),
            ),
        ),
        dlast=(dlast, at(0, shared - 1)),
    )
    outputs = dict(
        dq=(jax.ShapeDtypeStruct(q.shape, q.dtype), by_group),
        dk=(jax.ShapeDtypeStruct(k.shape, k.dtype), by_group),
        dv=(jax.ShapeDtypeStruct(v.shape, v.dtype), along(v_width)),
        dg=(jax.ShapeDtypeStruct(g.shape, jnp.float32), along(1)),
    )
    if not fresh:
        shape = jax.ShapeDtypeStruct((b, h, v_width, width), jnp.float32)
        outputs["dinitial"] = (shape, at(last, 0))
    scratch = dict(
        dstate=pltpu.VMEM((shared, v_width, width), jnp.float32),
        states=pltpu.VMEM((block // chunk + 1, v_width, width), jnp.float32),
        upto=pltpu.VMEM((chunk, chunk), jnp.bfloat16),
        strict=pltpu.VMEM((chunk, chunk), jnp.bfloat16),
        by_pair=pltpu.VMEM((block // chunk, chunk, chunk), jnp.float32),
        dq_sum=pltpu.VMEM((width, block), jnp.float32),
        dk_sum=pltpu.VMEM((width, block), jnp.float32),
        dv_pairs=pltpu.VMEM((v_width, block), jnp.float32),
        **{name: pltpu.VMEM((block // chunk, chunk), jnp.float32) for name in ROWS},
    )
    found = named_call(
        functools.partial(_body, how=how, grid=(steps, shared), dtype=dtype),
        name="simple_gla_backward",
        config=how.config,
        grid=(b, groups, steps, shared),
        semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        inputs=inputs,
        outputs=outputs,
        scratch=scratch,
    )
    return *(found[name] for name in ("dq", "dk", "dv", "dg")), found.get("dinitial")


def _body(at, *, how: How, grid: tuple[int, int], dtype):
    step, head, chunk = pl.program_id(2), pl.program_id(3), how.config.chunk
    n_chunks, (steps, shared) = how.config.block // chunk, grid
    at["dstate"] = at["dstate"].at[head]
    at["order"] = order = Order(at["upto"], at["strict"])
    order.upto[...], order.strict[...] = before(chunk), before(chunk, strictly=True)

    @pl.when(step == 0)
    def _():
        dstate = at["dstate"]
        dstate[...] = at["dlast"][0, 0] if "dlast" in at else jnp.zeros_like(dstate)

    @pl.when(head == 0)
    def _():
        at["dq_sum"][...] = jnp.zeros_like(at["dq_sum"])
        at["dk_sum"][...] = jnp.zeros_like(at["dk_sum"])

    first = at["states"].at[0]
    first[...] = at["saved"][0, 0, 0] if "saved" in at else jnp.zeros_like(first)

    def walk(one):
        def one_chunk(i, carry):
            i = n_chunks - 1 - i if one is down else i
            here = pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
            masks = seen(at["places"][0, :, here] if "places" in at else None, chunk)
            one(at, i, here, masks, how.scale, dtype)
            return carry

        jax.lax.fori_loop(0, n_chunks, one_chunk, 0)

    for one in (gates, values, scores, gates_gradient, up, down):
        walk(one)

    dg = at["dg_rows"][...] + ends_gradient(at["dstart"][...], at["dend"][...], order)
    for i in range(n_chunks):
        at["dg"][0, 0, :, i * chunk : (i + 1) * chunk] = dg[i : i + 1]

    @pl.when(head == shared - 1)
    def _():
        at["dq"][0, 0] = at["dq_sum"][...].astype(at["dq"].dtype)
        at["dk"][0, 0] = at["dk_sum"][...].astype(at["dk"].dtype)

    if "dinitial" in at:

        @pl.when(step == steps - 1)
        def _():
            at["dinitial"][0, 0] = at["dstate"][...]
