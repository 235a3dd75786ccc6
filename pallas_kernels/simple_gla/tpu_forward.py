"""simple_gla's forward kernel for TPUs: states stay on the chip.

Tokens lie on lanes. For each chunk of c tokens and each head, S `[v k]` before the chunk and P_ji
what decays from token j to token i (0 where i does not see j),

    y = scale (v (k^T q * P) + (S q) exp(F))          S <- exp(F_c) S + (v exp(E)) k^T
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu_parts import dot
from pallas_kernels.core.tpu_places import only, seen
from pallas_kernels.core.tpu_tokens import NN, NT, TN, named_call, product_dtype
from pallas_kernels.simple_gla.tpu_chunk import Order, before, decays, ends


class How(NamedTuple):
    """Static settings: see `simple_gla` and PallasTpuConfig."""

    scale: float
    config: Any


def forward(arrays, g, s, places, how: How, *, save: bool):
    """The kernel's call.

    Args:
        arrays: q and k `[b g k t]`, v `[b h v t]`; k and v multiples of 16, t of the block.
        g: `[b h 1 t]` float32, finite.
        s: `[b h v k]` float32, or None for zeros.
        places: `[b 1 t]` or None.
        how: settings.
        save: whether to give out the state before each block.

    Returns:
        y `[b h v t]`, the state after, and the states before each block `[b h n v k]` or None.
    """
    q, k, v = arrays
    (b, groups, width, t), (_, h, v_width, _) = q.shape, v.shape
    config = how.config
    shared, block = h // groups, config.block
    steps = t // block
    last = steps - 1

    by_group = pl.BlockSpec((1, 1, width, block), lambda i, j, s, n: (i, j, 0, s))
    along = lambda size: pl.BlockSpec(
        (1, 1, size, block), lambda i, j, s, n: (i, j * shared + n, 0, s)
    )
    # The state before is read at the first step, and the one after written at the last: there the
    # index moves from head to head, elsewhere it stays.
    at = lambda when, other: pl.BlockSpec(
        (1, 1, v_width, width),
        lambda i, j, s, n: (i, j * shared + jnp.where(s == when, n, other), 0, 0),
    )
    inputs = dict(
        q=(q, by_group),
        k=(k, by_group),
        v=(v, along(v_width)),
        g=(g, along(1)),
        places=(places, pl.BlockSpec((1, 1, block), lambda i, j, s, n: (i, 0, s))),
        initial=(s, at(0, shared - 1)),
    )
    outputs = dict(
        y=(jax.ShapeDtypeStruct(v.shape, v.dtype), along(v_width)),
        last=(jax.ShapeDtypeStruct((b, h, v_width, width), jnp.float32), at(last, 0)),
    )
    if save:
        outputs["saved"] = (
            jax.ShapeDtypeStruct((b, h, steps, v_width, width), jnp.float32),
            pl.BlockSpec(
                (1, 1, 1, v_width, width), lambda i, j, s, n: (i, j * shared + n, s, 0, 0)
            ),
        )
    found = named_call(
        functools.partial(_body, how=how, steps=steps, dtype=product_dtype(q, k, v)),
        name="simple_gla_forward",
        config=config,
        grid=(b, groups, steps, shared),
        semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        inputs=inputs,
        outputs=outputs,
        scratch=dict(
            state=pltpu.VMEM((shared, v_width, width), jnp.float32),
            upto=pltpu.VMEM((config.chunk, config.chunk), jnp.bfloat16),
            strict=pltpu.VMEM((config.chunk, config.chunk), jnp.bfloat16),
        ),
    )
    return found["y"], found["last"], found.get("saved")


def _body(at, *, how: How, steps: int, dtype):
    step, head, chunk = pl.program_id(2), pl.program_id(3), how.config.chunk
    state = at["state"].at[head]
    order = Order(at["upto"], at["strict"])
    order.upto[...], order.strict[...] = before(chunk), before(chunk, strictly=True)

    @pl.when(step == 0)
    def _():
        state[...] = at["initial"][0, 0] if "initial" in at else jnp.zeros_like(state)

    if "saved" in at:
        at["saved"][0, 0, 0] = state[...]

    def one_chunk(i, carry):
        here = pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
        masks = seen(at["places"][0, :, here] if "places" in at else None, chunk)
        q, k, v = (only(masks.valid, at[x][0, 0, :, here].astype(dtype)) for x in "qkv")
        p, start, end = decays(at["g"][0, 0, :, here], masks, order)
        start, end, through = ends(start, end, masks)
        w = dot(k, q, TN) * p
        read = dot(state[...].astype(dtype), q, NN) * start
        y = how.scale * (dot(v, w.astype(dtype), NN) + read)
        at["y"][0, 0, :, here] = only(masks.valid, y).astype(at["y"].dtype)
        new = dot((v.astype(jnp.float32) * end).astype(dtype), k, NT)
        state[...] = through * state[...] + new
        return carry

    jax.lax.fori_loop(0, how.config.block // chunk, one_chunk, 0)

    @pl.when(step == steps - 1)
    def _():
        at["last"][0, 0] = state[...]
