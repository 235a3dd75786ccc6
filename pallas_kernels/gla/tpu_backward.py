"""gla's backward kernel for TPUs: blocks of tokens from the last to the first.

A block's arrays come into the vector memory once, and are walked twice (tpu_walks.py): forward for
the states before its chunks, from the one that was saved before the block; and backward with the
gradient of the state, for everything else.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu_places import seen
from pallas_kernels.core.tpu_tokens import named_call, product_dtype
from pallas_kernels.gla.tpu_forward import How, chunk_scratch
from pallas_kernels.gla.tpu_levels import number
from pallas_kernels.gla.tpu_walks import down, up


def backward(arrays, saved, places, dy, dlast, how: How, *, fresh: bool) -> dict[str, jax.Array]:
    """The kernel's call.

    Args:
        arrays: q and k `[b h k t]`, v `[b h v t]`, g `[b h k t]`; k and v multiples of 16, t of the
            block.
        saved: the states before each block `[b h n k v]`, or None for a single one after zeros.
        places: `[b 1 t]` or None.
        dy: `[b h v t]`.
        dlast: gradient of the state after, `[b h k v]` float32, or None for zeros.
        how: settings.
        fresh: whether nobody asks for the gradient of the state before.

    Returns:
        Gradients dq, dk, dv, dg, and dinitial of the state before where somebody asks for it.
    """
    q, k, v, g = arrays
    (b, h, width, t), v_width = q.shape, v.shape[2]
    block, chunk = how.config.block, how.config.chunk
    steps, dtype = t // block, product_dtype(q, k, v)

    last = steps - 1  # the time axis runs from it to 0
    along = lambda size: pl.BlockSpec((1, 1, size, block), lambda i, j, s: (i, j, 0, last - s))
    state = pl.BlockSpec((1, 1, width, v_width), lambda i, j, s: (i, j, 0, 0))
    like = lambda x, spec: (jax.ShapeDtypeStruct(x.shape, x.dtype), spec)
    outputs = dict(
        dq=like(q, along(width)),
        dk=like(k, along(width)),
        dv=like(v, along(v_width)),
        dg=like(g, along(width)),
    )
    if not fresh:
        outputs["dinitial"] = (jax.ShapeDtypeStruct((b, h, width, v_width), jnp.float32), state)
    by_key = lambda *lead: pltpu.VMEM((*lead, width, chunk), jnp.float32)
    small = chunk_scratch(width, chunk, dtype)
    return named_call(
        functools.partial(_body, how=how, steps=steps, dtype=dtype),
        name="gla_backward",
        config=how.config,
        grid=(b, h, steps),
        semantics=("parallel", "parallel", "arbitrary"),
        inputs=dict(
            q=(q, along(width)),
            k=(k, along(width)),
            v=(v, along(v_width)),
            g=(g, along(width)),
            dy=(dy, along(v_width)),
            places=(places, pl.BlockSpec((1, 1, block), lambda i, j, s: (i, 0, last - s))),
            saved=(
                saved,
                pl.BlockSpec((1, 1, 1, width, v_width), lambda i, j, s: (i, j, last - s, 0, 0)),
            ),
            dlast=(dlast, state),
        ),
        outputs=outputs,
        scratch=dict(
            states=pltpu.VMEM((block // chunk, width, v_width), jnp.float32),
            dstate=pltpu.VMEM((width, v_width), jnp.float32),
            **small,
            decays=by_key(small["z"].shape[0]),
            dz=by_key(small["z"].shape[0] + 2),
            start=by_key(),
            end=by_key(),
            own=pltpu.VMEM((1, chunk), jnp.float32),
            dthrough=pltpu.VMEM((width, 1), jnp.float32),
        ),
    )


def _body(at, *, how: How, steps: int, dtype):
    step, chunk = pl.program_id(2), how.config.chunk
    n_chunks = how.config.block // chunk
    number(at)

    @pl.when(step == 0)
    def _():
        dstate = at["dstate"]
        dstate[...] = at["dlast"][0, 0] if "dlast" in at else jnp.zeros_like(dstate)

    first = at["states"].at[0]
    first[...] = at["saved"][0, 0, 0] if "saved" in at else jnp.zeros_like(first)

    def walk(one, count, number):
        def one_chunk(i, carry):
            i = number(i)
            here = pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
            look = lambda: seen(at["places"][0, :, here] if "places" in at else None, chunk)
            one(at, i, here, look, how.scale, dtype)
            return carry

        jax.lax.fori_loop(0, count, one_chunk, 0)

    walk(up, n_chunks - 1, lambda i: i)
    walk(down, n_chunks, lambda i: n_chunks - 1 - i)

    if "dinitial" in at:

        @pl.when(step == steps - 1)
        def _():
            at["dinitial"][0, 0] = at["dstate"][...]
