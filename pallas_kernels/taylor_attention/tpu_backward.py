"""taylor_attention's backward kernel for TPUs: blocks of tokens from the last to the first.

A block's q, k, v, dy and y come into the vector memory once, and are walked three times
(tpu_walks.py): for the pairs within chunks; forward from the state that was saved before the block,
which dq needs; and backward with the gradient of the state, which dk and dv need.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu import kernel_call
from pallas_kernels.core.tpu_places import seen
from pallas_kernels.core.tpu_tokens import product_dtype
from pallas_kernels.taylor_attention.cost import cost
from pallas_kernels.taylor_attention.tpu_features import rows_of
from pallas_kernels.taylor_attention.tpu_forward import How
from pallas_kernels.taylor_attention.tpu_layout import state_rows
from pallas_kernels.taylor_attention.tpu_walks import down, pairs, up


def backward(arrays, state, places, y, inverse, dy, dlast, how: How, *, has_state: bool):
    """The kernel's call.

    Args:
        arrays: q and k `[b h k t]`, v `[b h v t]`; k and v multiples of 16, t of the block.
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
    q, k, v = arrays
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
        dq_pairs=pltpu.VMEM((heads, width, block), jnp.float32),
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
            i = n_chunks - 1 - i if one_head is down else i
            here = pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
            masks = seen(at["places"][0, :, here] if "places" in at else None, chunk)
            for head in range(heads):
                one_head(at, head, here, masks, how, dtype)
            return carry

        jax.lax.fori_loop(0, n_chunks, one_chunk, 0)

    walk(pairs)
    walk(up)
    walk(down)

    if "dinitial" in at:

        @pl.when(step == steps - 1)
        def _():
            at["dinitial"][0] = at["dstate"][...]
