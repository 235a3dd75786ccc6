"""A transform and the way back, as pieces of the kernels' bodies (gpu_plan.py has the maths).

Two warpgroups work on one channel, each on half of the frequencies. A plane `[64 2M]` has real
numbers, the even rows of M tokens (p = 0) left of the odd ones; a warpgroup's operand `[64 2M]`,
bfloat16 in tiles for the matrix unit, has a plane's numbers, then real | imaginary parts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core.gpu_parts import layout_cast, tiles
from pallas_kernels.long_conv.gpu_plan import ROWS, WARPGROUPS, Plan

WGMMA = plgpu.Layout.WGMMA
BF16 = jnp.bfloat16


class Shared(NamedTuple):
    """Constants and operands in shared memory.

    Attributes:
        first, last, second: see Waves.
        operands: `[2 64 2M]`, one for each warpgroup.
        zero: `[1]`, 0. What hangs on it is computed anew for each channel: the compiler would keep
            twiddles and addresses in registers, of which there are not as many.
        arrived: barrier of the constants' copies.
        met: barrier of both warpgroups.
    """

    first: Any
    last: Any
    second: Any
    operands: Any
    zero: Any
    arrived: Any
    met: Any


def shared(plan: Plan) -> list:
    """The scratch of `Shared`, in its order."""
    m = plan.m
    tiled = lambda *shape: plgpu.SMEM(shape, BF16, transforms=tiles(2 * plan.tile))
    return [
        tiled(2, ROWS, ROWS),
        tiled(2, ROWS, ROWS),
        tiled(2, m, m),
        tiled(WARPGROUPS, ROWS, 2 * m),
        plgpu.SMEM((1,), jnp.int32),
        plgpu.Barrier(num_arrivals=3),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
    ]


def warpgroup() -> jax.Array:
    return jax.lax.axis_index("warpgroup")


def meet(refs: Shared) -> None:
    """Waits until both warpgroups are here."""
    plgpu.barrier_arrive(refs.met)
    plgpu.barrier_wait(refs.met)


def fetch_waves(first, last, second, refs: Shared, plan: Plan) -> None:
    """Brings the constant matrices; both warpgroups meet before they are used."""

    @pl.when(warpgroup() == 0)
    def _():
        plgpu.copy_gmem_to_smem(first, refs.first, refs.arrived)
        plgpu.copy_gmem_to_smem(last, refs.last, refs.arrived)
        plgpu.copy_gmem_to_smem(second, refs.second, refs.arrived)
        refs.zero[0] = jnp.int32(0)

    plgpu.barrier_wait(refs.arrived)


def lines(plan: Plan) -> Any:
    """A layout of `[64 tile]` in which a warp has whole lines: no two threads want one bank."""
    cut: tuple[tuple[int, ...], ...] = ((4, 32), (1,))
    warps = -3
    lanes: tuple[int, ...] = (-2,)
    if plan.tile == 16:
        cut, warps, lanes = ((8, 16), (2, 16), (1,)), -5, (-3, -2)
    return plgpu.Layout.TILED(plgpu.Tiling(cut), warp_dims=(warps,), lane_dims=lanes, vector_dim=-1)


def blocks(plan: Plan, width: int) -> list[slice]:
    """Columns, a tile at a time."""
    return [slice(at, at + plan.tile) for at in range(0, width, plan.tile)]


def halves(plan: Plan):
    """Even and odd rows of a plane; real and imaginary parts of an operand."""
    return slice(0, plan.m), slice(plan.m, 2 * plan.m)


def put(operand, parts, plan: Plan) -> None:
    """Real and imaginary parts, a block of columns after the other, into an operand."""
    for columns, (re, im) in zip(blocks(plan, plan.m), parts, strict=True):
        operand[:, columns] = re
        operand[:, imaginary(columns, plan)] = im
    plgpu.commit_smem()


def imaginary(columns: slice, plan: Plan) -> slice:
    """Columns of the imaginary parts of these, or of the odd rows right of the even ones."""
    return slice(columns.start + plan.m, columns.stop + plan.m)


def narrow(re, im):
    """As operands are."""
    return re.astype(BF16), im.astype(BF16)


def products(shape: tuple[int, int], terms) -> tuple:
    """For each of terms, the sum of the products of its pairs of references."""

    def body(*sums):
        for total, pairs in zip(sums, terms, strict=True):
            for a, b in pairs:
                plgpu.wgmma(total, a, b)
        plgpu.wgmma_wait(0)
        return tuple(total[...] for total in sums)

    return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for _ in terms))


def anew(matrices, refs: Shared):
    """Both of a pair of matrices; see `Shared.zero`."""
    zero = refs.zero[0]
    return matrices.at[zero], matrices.at[zero + 1]


def sign() -> jax.Array:
    """1 for the first warpgroup, -1 for the second."""
    return (1 - 2 * warpgroup()).astype(jnp.float32)


def place(shape: tuple[int, int], axis: int, plan: Plan):
    """Places along an axis."""
    return layout_cast(jax.lax.broadcasted_iota(jnp.int32, shape, axis), WGMMA, plan.config)


def _angles(columns: slice, refs: Shared, plan: Plan):
    """Cosine and sine of some columns of the twiddle."""
    shape = (ROWS, columns.stop - columns.start)
    r, j = (place(shape, axis, plan) for axis in (0, 1))
    turns = (2 * r + (1 - 256 * warpgroup() + refs.zero[0])) * (j + columns.start)
    angles = turns.astype(jnp.float32) * np.float32(np.pi / plan.n)
    return jnp.cos(angles), jnp.sin(angles)


def _rows(x, like):
    """`[64]` for every column."""
    return jax.lax.broadcast_in_dim(x, like.shape, (0,))


def first_stage(operand, odd, refs: Shared, plan: Plan) -> None:
    """The first stage of the plane in an operand, twiddled, in its place.

    Args:
        operand: of this warpgroup.
        odd: rho, real and imaginary part `[64]`.
        refs: Shared.
        plan: see Plan.
    """
    re, im = anew(refs.first, refs)
    for columns in blocks(plan, plan.m):  # the result of some columns lies where they lay
        even, uneven = operand.at[:, columns], operand.at[:, imaginary(columns, plan)]
        x, y, p, q = products(
            (ROWS, plan.tile), [[(re, even)], [(im, even)], [(re, uneven)], [(im, uneven)]]
        )
        c, s = (_rows(sign() * part, x) for part in odd)
        x, y = x + (c * p - s * q), y + (c * q + s * p)
        cos, sin = _angles(columns, refs, plan)
        operand[:, columns] = (x * cos + y * sin).astype(BF16)
        operand[:, imaginary(columns, plan)] = (y * cos - x * sin).astype(BF16)
    plgpu.commit_smem()


def second_stage(operand, columns: slice, refs: Shared, plan: Plan):
    """Columns q of the spectrum, real and imaginary parts `[64 tile]` float32."""
    re, im = (operand.at[:, half] for half in halves(plan))
    cos, sin = (matrix.at[:, columns] for matrix in anew(refs.second, refs))
    x, y, minus = products((ROWS, plan.tile), [[(re, cos), (im, sin)], [(im, cos)], [(re, sin)]])
    return x, y - minus


def back(operand, odd, refs: Shared, plan: Plan):
    """What has the spectrum in an operand, n / 2 times: rows 2 a + w of M numbers, `[64 M]`.

    w is the warpgroup; both meet on the way.
    """
    put(operand, [_back_second(operand, c, refs, plan) for c in blocks(plan, plan.m)], plan)
    meet(refs)
    parts = [_mixed(c, odd, refs, plan) for c in blocks(plan, plan.m)]
    meet(refs)
    put(operand, parts, plan)
    re, im = (operand.at[:, half] for half in halves(plan))
    left, right = anew(refs.last, refs)
    (out,) = products((ROWS, plan.m), [[(left, re), (right, im)]])
    return out


def _back_second(operand, columns: slice, refs: Shared, plan: Plan):
    """Columns j of the second stage back, twiddled."""
    re, im = (operand.at[:, half] for half in halves(plan))
    cos, sin = (matrix.at[:, columns] for matrix in anew(refs.second, refs))
    x, y, minus = products((ROWS, plan.tile), [[(re, cos)], [(im, cos), (re, sin)], [(im, sin)]])
    x, (cos, sin) = x - minus, _angles(columns, refs, plan)
    return narrow(x * cos - y * sin, y * cos + x * sin)


def _mixed(columns: slice, odd, refs: Shared, plan: Plan):
    """Of both warpgroups' numbers: their sum for the first; for the second, the difference times
    the conjugate of rho."""
    at = (columns, imaginary(columns, plan))
    of = lambda w, i: layout_cast(refs.operands[w, :, at[i]], WGMMA, plan.config)
    x, y = (of(0, i).astype(jnp.float32) + sign() * of(1, i).astype(jnp.float32) for i in (0, 1))
    second = warpgroup().astype(jnp.float32)
    c, s = _rows(1 + second * (odd[0] - 1), x), _rows(second * odd[1], x)
    return narrow(x * c + y * s, y * c - x * s)
