"""The kernels of one factor: a few blocks with all that belongs to them, tokens in a row."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import tpu
from pallas_kernels.core.tpu_parts import dot, each, part_of, rows_below

_CHANNELS = 256  # of a block's outputs that are worked on at once


def together(k: int, q: int, p: int) -> int:
    """How many blocks a step takes: the fewest whose channels are whole registers, else all."""
    for n in range(1, k):
        if k % n == 0 and n * q % tpu.LANES == 0 and n * p % tpu.LANES == 0:
            return n
    return k


def vmem(sizes: Mapping[str, int], tokens: int, backward: bool) -> int:
    """Bytes of the vector memory that a step takes."""
    k, q, p, itemsize = (sizes[x] for x in ("k", "q", "p", "itemsize"))
    n = together(k, q, p)
    width = lambda size: tpu.round_up(size, tpu.LANES)
    blocks = tokens * (width(n * p) * (1 + backward) + width(n * q)) * itemsize
    factor = n * p * width(q)
    between = tpu.LANES * width(max(p, part_of(q, _CHANNELS))) * 8
    return 2 * blocks + factor * (itemsize + 4 * backward) + between


def _grid(x, w, tokens: int):
    """Groups of blocks, then tokens; and the BlockSpecs of x, w and y."""
    k, p, q = w.shape
    n = together(k, q, p)
    once = pl.Buffered(1)  # a factor changes as seldom as there are groups
    specs = (
        pl.BlockSpec((tokens, n * p), lambda g, i: (i, g)),
        pl.BlockSpec((n, p, q), lambda g, i: (g, 0, 0), pipeline_mode=once),
        pl.BlockSpec((tokens, n * q), lambda g, i: (i, g)),
    )
    return (k // n, pl.cdiv(x.shape[0], tokens)), specs


def forward(x, w, config):
    """y `[rows k*q]` from x `[rows k*p]` and w `[k p q]`."""
    (k, _, q), rows = w.shape, x.shape[0]
    grid, (of_x, of_w, of_y) = _grid(x, w, config.tokens)
    return tpu.kernel_call(
        functools.partial(_fwd_kernel),
        name="monarch_matmul_blocks_forward",
        config=config,
        grid=grid,
        in_specs=[of_x, of_w],
        out_specs=of_y,
        out_shape=jax.ShapeDtypeStruct((rows, k * q), x.dtype),
        semantics=("parallel", "parallel"),
        cost=_cost(x, w, 1),
    )(x, w)


def _fwd_kernel(x_ref, w_ref, y_ref):
    n, p, q = w_ref.shape
    part = part_of(q, _CHANNELS)

    def tokens(at):
        rows = pl.ds(at, tpu.LANES)
        for i in range(n):
            x = x_ref[rows, i * p : (i + 1) * p]

            def channels(of, i=i, x=x):
                y = dot(x, w_ref[i, :, pl.ds(of, part)])
                y_ref[rows, pl.ds(i * q + of, part)] = y.astype(y_ref.dtype)

            each(q, part, channels)

    each(x_ref.shape[0], tpu.LANES, tokens)


def backward(x, w, dy, config):
    """dx `[rows k*p]` in the dtype of x and dw `[k p q]` in float32."""
    rows, tokens = x.shape[0], config.backward_tokens
    grid, (of_x, of_w, of_y) = _grid(x, w, tokens)
    return tpu.kernel_call(
        functools.partial(_bwd_kernel, n_rows=rows, ragged=bool(rows % tokens)),
        name="monarch_matmul_blocks_backward",
        config=config,
        grid=grid,
        in_specs=[of_x, of_w, of_y],
        out_specs=[of_x, of_w],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(w.shape, jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((tpu.LANES, w.shape[1]), jnp.float32)],
        semantics=("parallel", "arbitrary"),
        cost=_cost(x, w, 2),
    )(x, w, dy)


def _bwd_kernel(
    x_ref, w_ref, dy_ref, dx_ref, dw_ref, dx_part_ref, *, n_rows: int, ragged: bool
):  # fmt: skip
    n, p, q = w_ref.shape
    step, tokens, part = pl.program_id(1), x_ref.shape[0], part_of(q, _CHANNELS)

    @pl.when(step == 0)
    def _():
        dw_ref[...] = jnp.zeros_like(dw_ref)

    def part_of_tokens(at):
        rows = pl.ds(at, tpu.LANES)
        seen = lambda a: rows_below(a, n_rows - step * tokens - at) if ragged else a
        for i in range(n):
            x = seen(x_ref[rows, i * p : (i + 1) * p])
            dx_part_ref[...] = jnp.zeros_like(dx_part_ref)

            def channels(of, i=i, x=x):
                dy = seen(dy_ref[rows, pl.ds(i * q + of, part)])
                dx_part_ref[...] += dot(dy, w_ref[i, :, pl.ds(of, part)], (1, 1))
                dw_ref[i, :, pl.ds(of, part)] += dot(x, dy, (0, 0))

            each(q, part, channels)
            dx_ref[rows, i * p : (i + 1) * p] = dx_part_ref[...].astype(dx_ref.dtype)

    each(tokens, tpu.LANES, part_of_tokens)


def _cost(x, w, times: int) -> pl.CostEstimate:
    (k, p, q), rows, itemsize = w.shape, x.shape[0], x.dtype.itemsize
    moved = rows * k * (times * p + q) + times * math.prod(w.shape)
    return pl.CostEstimate(
        flops=2 * times * rows * k * p * q, bytes_accessed=moved * itemsize, transcendentals=0
    )
