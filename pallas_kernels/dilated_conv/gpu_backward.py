"""The backward kernel of a level, along the same walk: sums again, gradients of all it read."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.core import gpu
from pallas_kernels.dilated_conv.gpu_level import (
    LANES,
    STAGES,
    Lines,
    Walk,
    arguments,
    before,
    places,
    scratch,
    seen_by,
    sum_of,
    weight_rows,
)


def backward(x, weight, bias, past, sights, dy, walk: Walk, config):
    """dx in the dtype of x, dweight `[w e]`, dbias `[e]`, dpast; arguments as `forward`'s.

    Args:
        dy: `[b n d e]`.
    """
    b, n, d, e = x.shape
    given = arguments(x, weight, bias, past, sights) | dict(dy=dy)
    made: dict[str, Any] = dict(
        dx=jax.ShapeDtypeStruct(x.shape, x.dtype),
        dweight=jax.ShapeDtypeStruct((b, *walk.grid, walk.taps + 1, e), jnp.float32),
    )
    if walk.past:
        made["dpast"] = jax.ShapeDtypeStruct((b, walk.rows, d, e), jnp.float32)
    own = scratch(walk, x.dtype) | dict(dx_s=plgpu.SMEM((2, walk.rows, LANES), x.dtype))
    if walk.past:
        own["dpast_s"] = plgpu.SMEM((walk.rows, LANES), jnp.float32)

    def body(*refs):
        _backward_kernel(dict(zip((*given, *made, *own), refs, strict=True)), walk, config)

    found = gpu.kernel_call(
        body,
        name="dilated_conv_backward",
        config=config,
        out_type=list(made.values()),
        grid=(b, e // LANES, *walk.grid),
        grid_names=("batch", "channels", "phases", "part"),
        scratch_types=list(own.values()),
    )(*given.values())
    sums = jnp.sum(found[1], axis=(0, 1, 2))
    return found[0], sums[:-1], sums[-1], found[2] if walk.past else None


def _backward_kernel(refs, walk: Walk, config):
    lines, place = Lines(walk, config), places(walk)
    weights = weight_rows(refs, walk, lines)
    r, every = walk.rows, walk.parts * walk.chunks
    names = [name for name in ("sees_behind", "sees_ahead") if name in refs]
    zeros = lambda n: (lines.zero,) * n

    def finished(start: int, stop: int, begun, dx_s) -> int:
        """Stores rows start ... stop - 1 of the chunk before; gives where the next time begins."""
        stop = max(start, min(stop, r))
        for i in range(start, stop):
            dx_s[i] = begun[i].astype(dx_s.dtype)
            if walk.past:
                refs["dpast_s"][i] = begun[i]
        return stop

    def phase(index, sums):
        at = place(index)
        first = at.part * walk.chunks

        def step(indices, x_s, dy_s, *more):
            """Chunk c comes in; chunk c - late has its sums, and the one before it is finished."""
            (c,), (sights, carry) = indices, (more[:-1], more[-1])
            values, begun, sums = (list(part) for part in carry)
            new, chunk = lines.rows(x_s, r), c - walk.late
            if walk.late:
                there = lines.every(first + c < every)
                new = [lines.only(there, row) for row in new]
            values += new
            old, dx_s = list(sums), refs["dx_s"].at[lax.rem(c, 2)]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            in_row = lines.every((first + chunk < every) & (first + chunk >= 0))
            begun += zeros(r)  # by rows: the chunk before, this one, and as far as taps look ahead
            # Rows are stored as soon as they are finished: were all at the end, the compiler would
            # fetch what all rows see at the beginning, into more registers than there are.
            stored = 0
            for i in range(r):
                stored = finished(stored, i + r - walk.behind, begun, dx_s)
                dy = lines.of(dy_s[i]).astype(jnp.float32)
                seen = seen_by(sights, i, walk, lines)
                dy = lines.only(seen[walk.ahead], lines.only(in_row, dy))
                da = dy
                if walk.residual:
                    begun[r + i] = begun[r + i] + dy
                    a = sum_of(values, i, weights, seen, walk, lines)
                    da = lax.select(a > lines.zero, dy, lines.zero)
                for j in range(walk.taps):
                    tap, to = lines.only(seen[j], da), r + i - j + walk.ahead
                    begun[to] = begun[to] + weights[j] * tap
                    value = values[walk.behind + i - j + walk.ahead]
                    sums[j] = sums[j] + tap * value
                sums[walk.taps] = sums[walk.taps] + da
            if walk.parts > 1:  # of the only part all is: what lies outside of it is 0
                own = lines.every((chunk >= 0) & (chunk < walk.chunks))
                sums = [lax.select(own, new, same) for new, same in zip(sums, old, strict=True)]
            finished(stored, r, begun, dx_s)
            plgpu.commit_smem()

            @pl.when(chunk > 0)
            def _():
                rows = at.rows((first + chunk - 1) * r, r)
                plgpu.copy_smem_to_gmem(dx_s, refs["dx"].at[rows])

            if walk.past:

                @pl.when(chunk == 0)
                def _():
                    rows = at.rows(0, r)
                    plgpu.copy_smem_to_gmem(refs["dpast_s"], refs["dpast"].at[rows])
                    plgpu.wait_smem_to_gmem(0)

            return tuple(values[r:]), tuple(begun[r:]), tuple(sums)

        now = lambda c: lax.min(first + c, every - 1)
        done = lambda c: lax.clamp(0, first + c - walk.late, every - 1)
        carry = tuple(before(refs, at, walk, lines)), zeros(r + walk.ahead), tuple(sums)
        *_, sums = plgpu.emit_pipeline(
            step,
            grid=(walk.chunks + 1 + walk.late,),
            in_specs=[
                at.block(r, now),
                at.block(r, done),
                *(at.numbers(walk, done) for _ in names),
            ],
            max_concurrent_steps=STAGES,
            init_carry=carry,
        )(refs["x"], refs["dy"], *(refs[name] for name in names))
        plgpu.wait_smem_to_gmem(0)
        return tuple(sums)

    sums = lax.fori_loop(0, walk.phases, phase, zeros(walk.taps + 1))
    row, channels, group, part = (
        lax.axis_index(name) for name in ("batch", "channels", "phases", "part")
    )
    for j in range(walk.taps + 1):
        refs["weight_s"][j] = sums[j]
    plgpu.commit_smem()
    lanes = pl.ds(channels * LANES, LANES)
    plgpu.copy_smem_to_gmem(refs["weight_s"], refs["dweight"].at[row, group, part, :, lanes])
    plgpu.wait_smem_to_gmem(0)
