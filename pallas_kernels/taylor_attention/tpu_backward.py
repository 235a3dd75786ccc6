"""taylor_attention's backward kernel for TPUs: blocks of tokens from the last to the first.

A block's q, k, v, dy and y come into the vector memory once, and are walked twice: forward from the
state that was saved before the block (dq needs states), then backward with the state's gradient
(dk and dv need it). States and their gradients are held in float32 and, for products, a second time
in the products' type: reading that copy holds fewer registers. With v1 = [v, 1],
do = dy / (z + eps), do1 = [do, -sum(do y)] and r = q.k,

    forward:   dw = v1^T do1,  ds = dw (1 + scale r) scale,  dq = k ds + scale pull(S^T do1)
               dk = q ds^T,    dv = do w^T,                  S <- S + v1 phi(k)^T
    backward:  dk += pull(dS^T v1),  dv += dS phi(k),        dS <- dS + do1 phi(scale q)^T
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu import kernel_call
from pallas_kernels.taylor_attention.cost import cost
from pallas_kernels.taylor_attention.tpu_features import phi, pull, rows_of
from pallas_kernels.taylor_attention.tpu_forward import (
    NN,
    NT,
    TN,
    How,
    dot,
    product_dtype,
    state_rows,
    weights,
    with_ones,
)
from pallas_kernels.taylor_attention.tpu_places import Seen, only, seen


def backward(q, k, v, state, places, y, inverse, dy, dlast, how: How, *, has_state):
    """The kernel's call.

    Args:
        q, k: `[b h k t]`; k a multiple of 16, t of the block.
        v: `[b h v t]`.
        state: the states before each block `[b h n v1 f]` float32, or None for a single block that
            began with zeros.
        places: `[b 1 t]` or None.
        y, inverse: of the forward kernel; None if not normalized.
        dy: `[b h v t]`.
        dlast: gradient of the state after, `[b h v1 f]` float32, or None for zeros.
        how: settings.
        has_state: whether the gradient of the state before is asked for.

    Returns:
        Gradients of q, k, v and of the state before (or None).
    """
    (b, h, width, t), v_width, config = q.shape, v.shape[2], how.config
    heads, block = config.heads, config.block
    steps, dtype = t // block, product_dtype(q, k, v)
    rows, f = state_rows(v_width), rows_of(width)

    last = steps - 1  # the time axis runs from it to 0
    along = lambda n: pl.BlockSpec((1, heads, n, block), lambda i, j, s: (i, j, 0, last - s))
    states = pl.BlockSpec((1, heads, rows, f), lambda i, j, s: (i, j, 0, 0))
    inputs: dict[str, tuple] = dict(
        q=(q, along(width)),
        k=(k, along(width)),
        v=(v, along(v_width)),
        dy=(dy, along(v_width)),
        y=(y, along(v_width)),
        inverse=(inverse, along(1)),
        places=(places, pl.BlockSpec((1, 1, block), lambda i, j, s: (i, 0, last - s))),
        saved=(
            state,
            pl.BlockSpec((1, heads, 1, rows, f), lambda i, j, s: (i, j, last - s, 0, 0)),
        ),
        dlast=(dlast, states),
    )
    inputs = {name: pair for name, pair in inputs.items() if pair[0] is not None}
    outputs = dict(
        dq=(jax.ShapeDtypeStruct(q.shape, q.dtype), along(width)),
        dk=(jax.ShapeDtypeStruct(k.shape, k.dtype), along(width)),
        dv=(jax.ShapeDtypeStruct(v.shape, v.dtype), along(v_width)),
    )
    if has_state:
        outputs["dinitial"] = (jax.ShapeDtypeStruct((b, h, rows, f), jnp.float32), states)
    scratch = dict(
        state=pltpu.VMEM((heads, f, rows), jnp.float32),
        low=pltpu.VMEM((heads, f, rows), dtype),
        dlow=pltpu.VMEM((heads, rows, f), dtype),
        dstate=pltpu.VMEM((heads, rows, f), jnp.float32),
        dk_pairs=pltpu.VMEM((heads, width, block), jnp.float32),
        dv_pairs=pltpu.VMEM((heads, v_width, block), jnp.float32),
        v1=pltpu.VMEM((heads, rows, block), dtype),
        do1=pltpu.VMEM((heads, rows, block), dtype),
    )
    names = (*inputs, *outputs, *scratch)
    work = cost(b, t, h, width, v_width, itemsize=v.dtype.itemsize, backward=True)
    results = kernel_call(
        functools.partial(_body, names=names, how=how, steps=steps, dtype=dtype),
        name="taylor_attention_backward",
        config=config,
        grid=(b, h // heads, steps),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        semantics=("parallel", "parallel", "arbitrary"),
        scratch_shapes=list(scratch.values()),
        cost=pl.CostEstimate(int(work.flops), 0, int(work.bytes)),
    )(*(x for x, _ in inputs.values()))
    return tuple(results) if has_state else (*results, None)


def _body(*refs, names, how: How, steps: int, dtype):
    at = dict(zip(names, refs, strict=True))
    step, chunk, heads = pl.program_id(2), how.config.chunk, how.config.heads
    n_chunks = how.config.block // chunk

    @pl.when(step == 0)
    def _():
        dlast = at["dlast"][0] if "dlast" in at else jnp.zeros_like(at["dstate"])
        at["dstate"][...], at["dlow"][...] = dlast, dlast.astype(dtype)

    for head in range(heads):
        state = at["state"]
        state[head] = at["saved"][0, head, 0].T if "saved" in at else jnp.zeros_like(state[head])
        at["low"][head] = state[head].astype(dtype)

    def walk(one_head):
        def one_chunk(i, carry):
            i = i if one_head is _up else n_chunks - 1 - i
            here = pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
            masks = seen(at["places"][0, :, here] if "places" in at else None, chunk)
            for head in range(heads):
                one_head(at, head, here, masks, how, dtype)
            return carry

        jax.lax.fori_loop(0, n_chunks, one_chunk, 0)

    walk(_up)
    walk(_down)

    if "dinitial" in at:

        @pl.when(step == steps - 1)
        def _():
            at["dinitial"][0] = at["dstate"][...]


def _up(at, head: int, here, masks: Seen, how: How, dtype):
    """One chunk of the forward walk: dq, and what pairs give to dk and dv."""
    scale, state = how.scale, at["state"]
    q, k = _inputs(at, head, here, masks, dtype)
    v1, do1 = (at[name].at[head, :, here] for name in ("v1", "do1"))
    v1[...] = with_ones(at["v"][0, head, :, here].astype(dtype), masks.valid, v1.shape[0])
    do = only(masks.valid, at["dy"][0, head, :, here].astype(jnp.float32))
    total = None
    if how.normalize:
        do = do * at["inverse"][0, head, :, here]
        y = only(masks.valid, at["y"][0, head, :, here].astype(jnp.float32))
        total = -jnp.sum(do * y, axis=0, keepdims=True)
    do1[...] = _with_total(do, total, v1.shape[0]).astype(dtype)

    r = dot(k, q, TN)
    ds = dot(v1[...], do1[...], TN) * (scale + (scale * scale) * r)
    ds = jnp.where(masks.pairs, ds, 0).astype(dtype)
    w = weights(r, masks.pairs, scale).astype(dtype)
    at["dk_pairs"][head, :, here] = dot(q, ds, NT)
    at["dv_pairs"][head, :, here] = dot(do1[: do.shape[0]], w, NT)

    dphi = dot(at["low"][head], only(masks.head, do1[...]), NN)
    dq = dot(k, ds, NN) + scale * pull(scale * q.astype(jnp.float32), dphi)
    at["dq"][0, head, :, here] = dq.astype(at["dq"].dtype)
    new = dot(phi(k.astype(jnp.float32)).astype(dtype), only(masks.tail, v1[...]), NT)
    new = only(masks.kept, state[head]) + new
    state[head], at["low"][head] = new, new.astype(dtype)


def _down(at, head: int, here, masks: Seen, how: How, dtype):
    """One chunk of the backward walk: what the state's gradient gives to dk and dv."""
    dstate, (v_width, _) = at["dstate"], at["dv_pairs"].shape[1:]
    q, k = _inputs(at, head, here, masks, dtype)
    v1 = only(masks.tail, at["v1"][head, :, here])
    do1 = only(masks.head, at["do1"][head, :, here])
    k = k.astype(jnp.float32)
    dphi = dot(at["dlow"][head], v1, TN)
    dk = at["dk_pairs"][head, :, here] + pull(k, dphi)
    read = only(masks.tail, dot(at["dlow"][head], phi(k).astype(dtype), NN))
    dv = only(masks.valid, at["dv_pairs"][head, :, here] + read[:v_width])
    at["dk"][0, head, :, here] = dk.astype(at["dk"].dtype)
    at["dv"][0, head, :, here] = dv.astype(at["dv"].dtype)
    new = dot(do1, phi(how.scale * q.astype(jnp.float32)).astype(dtype), NT)
    new = only(masks.kept, dstate[head]) + new
    dstate[head], at["dlow"][head] = new, new.astype(dtype)


def _inputs(at, head: int, here, masks: Seen, dtype):
    q = only(masks.valid, at["q"][0, head, :, here].astype(dtype))
    k = only(masks.valid, at["k"][0, head, :, here].astype(dtype))
    return q, k


def _with_total(do: jax.Array, total: jax.Array | None, rows: int) -> jax.Array:
    """`[v c]` with one more row behind it (or zeros), up to so many rows."""
    extra = (rows - do.shape[0], do.shape[1])
    if total is None:
        return jnp.concatenate([do, jnp.zeros(extra, do.dtype)], axis=0)
    first = jax.lax.broadcasted_iota(jnp.int32, extra, 0) == 0
    return jnp.concatenate([do, jnp.where(first, total, 0)], axis=0)
