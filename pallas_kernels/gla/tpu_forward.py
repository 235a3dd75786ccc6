"""gla's forward kernel for TPUs: states stay on the chip.

Tokens lie on lanes. For each chunk of c tokens, S `[k v]` before it and P_ji the product of key j
and query i with the decay between them (0 where i does not see j),

    y = scale (v P + S^T (q exp(F)))          S <- exp(F_c) S + (k exp(E)) v^T
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core.tpu import LANES
from pallas_kernels.core.tpu_parts import dot, each, part_of
from pallas_kernels.core.tpu_places import only, seen
from pallas_kernels.core.tpu_tokens import NN, NT, TN, named_call, product_dtype
from pallas_kernels.gla.tpu_levels import factors, number, scores, sizes


class How(NamedTuple):
    """Static settings: see `gla` and PallasTpuConfig."""

    scale: float
    config: Any


def chunk_scratch(k: int, chunk: int, dtype) -> dict[str, Any]:
    """What both kernels hold of a chunk."""
    return dict(
        order=pltpu.VMEM((chunk, chunk), jnp.int32),
        token=pltpu.VMEM((1, chunk), jnp.int32),
        z=pltpu.VMEM((max(1, len(sizes(chunk))), k, chunk), dtype),
        to_end=pltpu.VMEM((k, chunk), dtype),
        from_start=pltpu.VMEM((k, chunk), dtype),
        through=pltpu.VMEM((k, 1), jnp.float32),
        sum=pltpu.VMEM((chunk, chunk), jnp.float32),
        pairs=pltpu.VMEM((chunk, chunk), dtype),
    )


def forward(arrays, s, places, how: How, *, save: bool) -> dict[str, jax.Array]:
    """The kernel's call.

    Args:
        arrays: q and k `[b h k t]`, v `[b h v t]`, g `[b h k t]`; k and v multiples of 16, t of the
            block.
        s: `[b h k v]` float32, or None for zeros.
        places: `[b 1 t]` or None.
        how: settings.
        save: whether to give out the state before each block.

    Returns:
        y `[b h v t]`, last `[b h k v]`, and where they are to be saved, saved `[b h n k v]`.
    """
    q, k, v, g = arrays
    (b, h, width, t), v_width = q.shape, v.shape[2]
    block, chunk = how.config.block, how.config.chunk
    steps, dtype = t // block, product_dtype(q, k, v)

    along = lambda size: pl.BlockSpec((1, 1, size, block), lambda i, j, s: (i, j, 0, s))
    state = pl.BlockSpec((1, 1, width, v_width), lambda i, j, s: (i, j, 0, 0))
    outputs = dict(
        y=(jax.ShapeDtypeStruct(v.shape, v.dtype), along(v_width)),
        last=(jax.ShapeDtypeStruct((b, h, width, v_width), jnp.float32), state),
    )
    if save:
        outputs["saved"] = (
            jax.ShapeDtypeStruct((b, h, steps, width, v_width), jnp.float32),
            pl.BlockSpec((1, 1, 1, width, v_width), lambda i, j, s: (i, j, s, 0, 0)),
        )
    return named_call(
        functools.partial(_body, how=how, steps=steps, dtype=dtype),
        name="gla_forward",
        config=how.config,
        grid=(b, h, steps),
        semantics=("parallel", "parallel", "arbitrary"),
        inputs=dict(
            q=(q, along(width)),
            k=(k, along(width)),
            v=(v, along(v_width)),
            g=(g, along(width)),
            places=(places, pl.BlockSpec((1, 1, block), lambda i, j, s: (i, 0, s))),
            initial=(s, state),
        ),
        outputs=outputs,
        scratch=dict(
            state=pltpu.VMEM((width, v_width), jnp.float32), **chunk_scratch(width, chunk, dtype)
        ),
    )


def _body(at, *, how: How, steps: int, dtype):
    step, chunk = pl.program_id(2), how.config.chunk
    state, v_width = at["state"], at["v"].shape[2]
    number(at)

    @pl.when(step == 0)
    def _():
        state[...] = at["initial"][0, 0] if "initial" in at else jnp.zeros_like(state)

    if "saved" in at:
        at["saved"][0, 0, 0] = state[...]

    def one_chunk(i, carry):
        here = pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
        look = lambda: seen(at["places"][0, :, here] if "places" in at else None, chunk)
        factors(at, here, look, dtype)
        scores(at, here, look, dtype)
        part = part_of(v_width, LANES)

        def values(first):
            rows, masks = pl.ds(first, part), look()
            v = only(masks.valid, at["v"][0, 0, rows, here].astype(dtype))
            read = dot(state[:, rows].astype(dtype), at["from_start"][...], TN)
            y = how.scale * (dot(v, at["pairs"][...], NN) + read)
            at["y"][0, 0, rows, here] = only(masks.valid, y).astype(at["y"].dtype)
            new = dot(at["to_end"][...], v, NT)
            state[:, rows] = at["through"][...] * state[:, rows] + new

        each(v_width, part, values)
        return carry

    jax.lax.fori_loop(0, how.config.block // chunk, one_chunk, 0)

    @pl.when(step == steps - 1)
    def _():
        at["last"][0, 0] = state[...]
