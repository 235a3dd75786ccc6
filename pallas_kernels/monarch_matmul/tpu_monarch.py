"""The kernels of two factors. Tokens lie on the lanes between them: turning the axis `[r l]` round
is then loading every l-th row, which costs no more than loading rows.

    Z = W1 X^T,   rows in their order
    for every l: Y[l::L] = W2[l] Z[l::L]
    y = Y^T
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import tpu
from pallas_kernels.core.tpu_parts import dot, each, part_of, rows_below

_TOKENS = tpu.LANES  # that are worked on at once
_CHANNELS = 256  # of a block's outputs that are worked on at once


def gathered(k: int, q: int, p: int) -> int:
    """How many of k blocks are put together, so that they fill a matrix unit of 128."""
    return max(n for n in range(1, k + 1) if k % n == 0 and (n == 1 or n * max(q, p) <= tpu.LANES))


def vmem(sizes: Mapping[str, int], tokens: int, backward: bool) -> int:
    """Bytes of the vector memory that a step takes."""
    k, q, p, l, s, r, itemsize = (sizes[x] for x in (*"kqplsr", "itemsize"))
    width = lambda size: tpu.round_up(size, tpu.LANES)
    blocks = tokens * (width(k * p) * (1 + backward) + width(l * s)) * itemsize
    factors = 0
    for blocks_of, rows, columns in ((k, q, p), (l, r, s) if backward else (l, s, r)):
        n = gathered(blocks_of, rows, columns)
        factors += blocks_of * rows * width(n * columns)
    between = _TOKENS * 4 * (k * q + l * s + 2 * max(k * p, s, r))
    return 2 * blocks + factors * (itemsize + 4 * backward) + between


def forward(x, w1, w2, n_blocks: int, config):
    """y `[rows l*s]` from x `[rows k*p]`.

    Args:
        x: `[rows k*p]`.
        w1: `[k q p]`, w2: `[l s r]`, in the dtype of x; neighbours may be put together.
        n_blocks: l, before that.
        config: of the form.
    """
    rows, tokens = x.shape[0], config.tokens
    between, out = w1.shape[0] * w1.shape[1], w2.shape[0] * w2.shape[1]
    return tpu.kernel_call(
        functools.partial(_fwd_kernel, n_blocks=n_blocks),
        name="monarch_matmul_forward",
        config=config,
        grid=(pl.cdiv(rows, tokens),),
        in_specs=[_tokens(tokens, x.shape[1]), _whole(w1.shape), _whole(w2.shape)],
        out_specs=_tokens(tokens, out),
        out_shape=jax.ShapeDtypeStruct((rows, out), x.dtype),
        scratch_shapes=[
            pltpu.VMEM((between, _TOKENS), jnp.float32),
            pltpu.VMEM((out, _TOKENS), jnp.float32),
        ],
        semantics=("parallel",),
        cost=_cost(x, w1, w2, 1),
    )(x, w1, w2)


def _tokens(tokens: int, channels: int) -> pl.BlockSpec:
    return pl.BlockSpec((tokens, channels), lambda i: (i, 0))


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda i: (0,) * len(shape), pipeline_mode=pl.Buffered(1))


def _first(x_of, w_ref, z_ref):
    """Z `[k*q 128]` from x_of(i) `[128 p]`, rounded as x is."""
    k, q, _ = w_ref.shape
    for i in range(k):
        x = x_of(i)
        z = dot(w_ref[i], x, (1, 1))
        z_ref[i * q : (i + 1) * q] = z.astype(x.dtype).astype(jnp.float32)


def _turned(ref, i: int, n: int, n_blocks: int, part, dtype):
    """Of the i-th n blocks, every n_blocks-th row, `[n*r 128]`; of one block those of a part."""
    first, size = part
    rows = [ref[pl.ds(i * n + j + first * n_blocks, size, stride=n_blocks), :] for j in range(n)]
    return (rows[0] if n == 1 else jnp.concatenate(rows, axis=0)).astype(dtype)


def _turn_back(ref, i: int, n: int, n_blocks: int, part, value):
    """Puts `[n*r 128]` where `_turned` takes it from."""
    first, size = part
    for j in range(n):
        ref[pl.ds(i * n + j + first * n_blocks, size, stride=n_blocks), :] = value[
            j * size : (j + 1) * size
        ]


def _part(n: int, s: int) -> int:
    """Rows of a block that are worked on at once; of blocks put together, all."""
    return part_of(s, _CHANNELS) if n == 1 else s


def _fwd_kernel(x_ref, w1_ref, w2_ref, y_ref, z_ref, between_ref, *, n_blocks: int):
    groups, p, dtype = w2_ref.shape[0], w1_ref.shape[2], x_ref.dtype
    n, s, r = n_blocks // groups, between_ref.shape[0] // n_blocks, z_ref.shape[0] // n_blocks
    part = _part(n, s)

    def tokens(at):
        rows = pl.ds(at, _TOKENS)
        _first(lambda i: x_ref[rows, i * p : (i + 1) * p], w1_ref, z_ref)
        for i in range(groups):
            z = _turned(z_ref, i, n, n_blocks, (0, r), dtype)

            def channels(of, i=i, z=z):
                y = dot(w2_ref[i, pl.ds(n * of, n * part), :], z)
                _turn_back(between_ref, i, n, n_blocks, (of, part), y)

            each(s, part, channels)
        out = part_of(s * n_blocks, _CHANNELS)

        def finish(of):
            y = between_ref[pl.ds(of, out), :].T
            y_ref[rows, pl.ds(of, out)] = y.astype(dtype)

        each(s * n_blocks, out, finish)

    each(x_ref.shape[0], _TOKENS, tokens)


def backward(x, w1, w2, dy, n_blocks: int, config):
    """dx in the dtype of x, dw1 `[k q p]` and dw2 `[l r s]` in float32; arguments as `forward`'s.

    Args:
        x: `[rows k*p]`.
        w1: `[k q p]`.
        w2: `[l r s]`, turned round.
        dy: `[rows l*s]`.
        n_blocks: l, before neighbours were put together.
        config: of the form.
    """
    rows, tokens = x.shape[0], config.backward_tokens
    between, out = w1.shape[0] * w1.shape[1], w2.shape[0] * w2.shape[2]
    return tpu.kernel_call(
        functools.partial(_bwd_kernel, n_blocks=n_blocks, n_rows=rows, ragged=bool(rows % tokens)),
        name="monarch_matmul_backward",
        config=config,
        grid=(pl.cdiv(rows, tokens),),
        in_specs=[
            _tokens(tokens, x.shape[1]),
            _whole(w1.shape),
            _whole(w2.shape),
            _tokens(tokens, out),
        ],
        out_specs=[_tokens(tokens, x.shape[1]), _whole(w1.shape), _whole(w2.shape)],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(w1.shape, jnp.float32),
            jax.ShapeDtypeStruct(w2.shape, jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((between, _TOKENS), jnp.float32),
            pltpu.VMEM((out, _TOKENS), jnp.float32),
            pltpu.VMEM((w2.shape[1], _TOKENS), jnp.float32),
        ],
        semantics=("arbitrary",),
        cost=_cost(x, w1, w2, 2),
    )(x, w1, w2, dy)


def _bwd_kernel(
    x_ref, w1_ref, w2_ref, dy_ref, dx_ref, dw1_ref, dw2_ref, z_ref, between_ref, dz_ref,
    *, n_blocks: int, n_rows: int, ragged: bool,
):  # fmt: skip
    (k, q, p), groups, dtype = w1_ref.shape, w2_ref.shape[0], x_ref.dtype
    n, s, r = n_blocks // groups, between_ref.shape[0] // n_blocks, z_ref.shape[0] // n_blocks
    step, tokens, part = pl.program_id(0), x_ref.shape[0], _part(n, s)

    @pl.when(step == 0)
    def _():
        dw1_ref[...] = jnp.zeros_like(dw1_ref)
        dw2_ref[...] = jnp.zeros_like(dw2_ref)

    def part_of_tokens(at):
        rows = pl.ds(at, _TOKENS)
        # What lies behind the last token is not zero.
        seen = lambda a: rows_below(a, n_rows - step * tokens - at) if ragged else a
        x_of = lambda i: seen(x_ref[rows, i * p : (i + 1) * p])
        _first(x_of, w1_ref, z_ref)
        out = part_of(s * n_blocks, _CHANNELS)

        def begin(of):
            dy = seen(dy_ref[rows, pl.ds(of, out)])
            between_ref[pl.ds(of, out), :] = dy.astype(jnp.float32).T

        each(s * n_blocks, out, begin)
        for i in range(groups):
            z = _turned(z_ref, i, n, n_blocks, (0, r), dtype)
            dz_ref[...] = jnp.zeros_like(dz_ref)

            def channels(of, i=i, z=z):
                columns = pl.ds(n * of, n * part)
                dy = _turned(between_ref, i, n, n_blocks, (of, part), dtype)
                dw2_ref[i, :, columns] += dot(z, dy, (1, 1))
                dz_ref[...] += dot(w2_ref[i, :, columns], dy)

            each(s, part, channels)
            dz = dz_ref[...].astype(dtype).astype(jnp.float32)
            _turn_back(z_ref, i, n, n_blocks, (0, r), dz)  # in the place of z
        for i in range(k):
            dz = z_ref[i * q : (i + 1) * q].astype(dtype)
            dx = dot(dz, w1_ref[i], (0, 0))
            dx_ref[rows, i * p : (i + 1) * p] = dx.astype(dtype)
        for i in range(k):
            dz = z_ref[i * q : (i + 1) * q].astype(dtype)
            dw1_ref[i] += dot(dz, x_of(i))

    each(tokens, _TOKENS, part_of_tokens)


def _cost(x, w1, w2, times: int) -> pl.CostEstimate:
    rows, itemsize = x.shape[0], x.dtype.itemsize
    moved = rows * (times * x.shape[1] + w2.size // w2.shape[1]) + times * (w1.size + w2.size)
    return pl.CostEstimate(
        flops=2 * (3 * times - 2) * rows * (w1.size + w2.size),
        bytes_accessed=moved * itemsize,
        transcendentals=0,
    )
