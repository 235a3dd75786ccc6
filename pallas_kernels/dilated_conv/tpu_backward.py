"""The backward kernel. It goes through a segment of time twice: forward, to have what every level
reads in planes; then back, block by block, from the last level to the first."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import tpu
from pallas_kernels.core.tpu_parts import Refs
from pallas_kernels.dilated_conv.tpu_forward import cost, next_level, sights_of
from pallas_kernels.dilated_conv.tpu_plan import (
    Plan,
    columns,
    each_rows,
    in_row,
    move,
    rows_at,
    seen,
    taps_of,
    tokens_below,
    weighted,
)

_SUMS = 8  # sublanes on which gradients of the parameters are summed


def scratch_of(plan: Plan, parameters: int, sight_rows: tuple[int, int]) -> list:
    """The shapes of what the kernel keeps: planes, windows, sums, sights."""
    lanes, block = tpu.LANES, plan.block
    rows = [m + _swept(plan) * block for m in plan.planes()]
    rows += [block + tpu.round_up(x.reach, 8) for x in plan.levels]
    rows += [block + tpu.round_up(h, 8) for h in (plan.hold, *(x.late for x in plan.levels))]
    rows += [parameters * _SUMS]
    shapes = [pltpu.VMEM((n, lanes), jnp.float32) for n in rows]
    sights = [pltpu.VMEM((n * block, lanes), jnp.int32) for n in sight_rows if n]
    return shapes + sights


def _swept(plan: Plan) -> int:
    """Blocks of a segment that are swept forward."""
    return min(plan.segment, plan.blocks) + plan.extra


def _returned(plan: Plan) -> int:
    """Blocks of a segment on the way back."""
    return min(plan.segment, plan.blocks) + plan.extra


def backward(x, weight, bias, starts, sights, dy, plan: Plan, config):
    """dx `[b t e]`, dweight `[j*w e]` and dbias `[j e]` in float32; arguments as `forward`'s.

    Args:
        x, weight, bias: as they were.
        starts: float32 `[b segments m e]` of the forward kernel; None = one segment.
        sights: two int32 arrays `[b r n]`, for the sweep forward and the way back; None = one
            document.
        dy: `[b t e]`.
        plan: see Plan.
        config: of the form.
    """
    b, t, e = x.shape
    lanes, block, segment = tpu.LANES, plan.block, min(plan.segment, plan.blocks)
    swept, returned, segments = _swept(plan), _returned(plan), plan.segments

    def of(n):
        """The segment of a step, the last one first, and the step in it."""
        per = swept + returned
        return segments - 1 - n // per, n % per

    def x_index(c, i, n):
        s, k = of(n)
        return i, jnp.minimum(s * segment + jnp.minimum(k, swept - 1), plan.blocks - 1), c

    def dy_index(c, i, n):
        s, k = of(n)
        place = s * segment + segment - 1 - jnp.maximum(k - swept, 0)
        return i, jnp.clip(place, 0, plan.blocks - 1), c

    def dx_index(c, i, n):
        s, k = of(n)
        place = s * segment + segment - 1 + plan.extra - jnp.maximum(k - swept, 0)
        return i, jnp.clip(place, 0, plan.blocks - 1), c

    whole = lambda a: pl.BlockSpec((a.shape[0], lanes), lambda c, i, n: (0, c))
    tokens = lambda index: pl.BlockSpec((1, block, lanes), index)
    in_specs = [tokens(x_index), tokens(dy_index), whole(weight), whole(bias)]
    arguments = [x, dy, weight, bias]
    if starts is not None:
        size = starts.shape[2]
        in_specs.append(pl.BlockSpec((1, 1, size, lanes), lambda c, i, n: (i, of(n)[0], 0, c)))
        arguments.append(starts)
    sight_rows = (0, 0)
    if sights is not None:
        sight_rows = tuple(s.shape[1] for s in sights)
        before, back = (lambda r, index: pl.BlockSpec((1, r, block), index),) * 2

        def sweep_index(c, i, n):
            s, k = of(n)
            return i, 0, s * segment + jnp.minimum(k, swept - 1)

        def back_index(c, i, n):
            s, k = of(n)
            return i, 0, s * segment + returned - 1 - jnp.maximum(k - swept, 0)

        in_specs += [before(sight_rows[0], sweep_index), back(sight_rows[1], back_index)]
        arguments += list(sights)
    dx, dweight, dbias = tpu.kernel_call(
        functools.partial(_bwd_kernel, plan=plan, batch=b, starts=starts is not None),
        name="dilated_conv_backward",
        config=config,
        grid=(pl.cdiv(e, lanes), b, segments * (swept + returned)),
        in_specs=in_specs,
        out_specs=[tokens(dx_index), whole(weight), whole(bias)],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(weight.shape, jnp.float32),
            jax.ShapeDtypeStruct(bias.shape, jnp.float32),
        ],
        scratch_shapes=scratch_of(plan, weight.shape[0] + bias.shape[0], sight_rows),
        semantics=("parallel", "arbitrary", "arbitrary"),
        cost=cost(x, plan, 4),
    )(*arguments)
    return dx, dweight, dbias


def _bwd_kernel(x_ref, dy_ref, weight_ref, bias_ref, *refs, plan: Plan, batch: int, starts: bool):
    rest, n_levels = Refs(refs), len(plan.levels)
    starts_ref = rest.take(starts)
    sights_refs = rest.several(2 * plan.documents)
    dx_ref, dweight_ref, dbias_ref = rest.several(3)
    planes, windows = rest.several(n_levels), rest.several(n_levels)
    given, sums_ref = rest.several(n_levels + 1), rest.take()
    seen_refs = rest.take(plan.documents), rest.take(plan.documents)
    segment = min(plan.segment, plan.blocks)
    swept, returned = _swept(plan), _returned(plan)
    step, row_of_batch = pl.program_id(2), pl.program_id(1)
    per = swept + returned
    at_segment, k = plan.segments - 1 - step // per, step % per
    origin = at_segment * segment  # block

    @pl.when((step == 0) & (row_of_batch == 0))
    def _():
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.when(step == 0)
    def _():
        for ref in (*windows, *given):
            ref[...] = jnp.zeros_like(ref)

    @pl.when(k == 0)
    def _():
        at = 0
        for ref, margin in zip(planes, plan.planes(), strict=True):
            if starts:
                ref[:margin] = starts_ref[0, 0, at : at + margin]
                at += margin
            else:
                ref[:margin] = jnp.zeros((margin, tpu.LANES), jnp.float32)

    @pl.when(k < swept)
    def _():
        if plan.documents:
            columns(sights_refs[0][0], seen_refs[0])
        _sweep(x_ref, weight_ref, bias_ref, planes, seen_refs[0], plan, origin, k)

    @pl.when(k >= swept)
    def _():
        if plan.documents:
            columns(sights_refs[1][0], seen_refs[1])
        n = segment - 1 - (k - swept)  # block of the segment; below 0 while the last come out
        _back(
            dy_ref, dx_ref, weight_ref, bias_ref, planes, windows, given, sums_ref, seen_refs[1],
            plan, origin, n,
        )  # fmt: skip

    @pl.when((step == plan.segments * per - 1) & (row_of_batch == batch - 1))
    def _():
        for ref, first in ((dweight_ref, 0), (dbias_ref, dweight_ref.shape[0])):
            for i in range(ref.shape[0]):
                rows = sums_ref[(first + i) * _SUMS : (first + i + 1) * _SUMS]
                ref[i : i + 1] = jnp.sum(rows, axis=0, keepdims=True)


def _sweep(x_ref, weight_ref, bias_ref, planes, seen_ref, plan: Plan, origin, k):
    """What each level reads, of block k of the segment."""
    before, late, at = plan.planes(), plan.lateness(), pl.multiple_of(k * plan.block, 8)
    count = plan.t - (origin + k) * plan.block
    planes[0][pl.ds(at + before[0], plan.block), :] = tokens_below(x_ref[0], count)

    def part(row, carry):
        for i in range(len(plan.levels) - 1):
            first = at + row - late[i + 1]  # the output's place in the segment
            s = next_level(
                planes[i],
                weight_ref,
                bias_ref,
                plan,
                i,
                before[i] + first + plan.levels[i].late,
                *sights_of(seen_ref, plan, i, row),
            )
            if plan.late and not plan.documents:
                s = jnp.where(in_row(first, plan.rows, plan.t), s, 0)
            planes[i + 1][pl.ds(before[i + 1] + first, plan.rows), :] = s
        return carry

    each_rows(plan.block, plan.rows, part)


def _back(
    dy_ref, dx_ref, weight_ref, bias_ref, planes, windows, given, sums_ref, seen_ref,
    plan: Plan, origin, n,
):  # fmt: skip
    """Block n of the segment, from dy to dx.

    given[i + 1] holds gradients of what level i gives; windows[i] those of its sums.
    """
    block, early, n_levels = plan.block, plan.earliness(), len(plan.levels)
    for i, level in enumerate(plan.levels):
        move(windows[i], block, 0, tpu.round_up(level.reach, 8))
        if level.late:
            move(given[i + 1], block, 0, tpu.round_up(level.late, 8))
    if plan.hold:
        move(given[0], block, 0, tpu.round_up(plan.hold, 8))
    count = jnp.where(n >= 0, plan.t - (origin + n) * block, 0)
    given[n_levels][:block] = tokens_below(dy_ref[0], count)
    for i in reversed(range(n_levels)):
        first = n * block + early[i + 1]  # place in the segment of the first sum
        _sums(
            weight_ref, bias_ref, planes[i], windows[i], given[i + 1], sums_ref, seen_ref, plan, i,
            first,
        )  # fmt: skip
        _inputs(weight_ref, windows[i], given[i + 1], given[i], seen_ref, plan, i, n)

    def finish(row, carry):
        dx = rows_at(given[0], row + plan.hold, plan.rows)
        dx_ref[0, pl.ds(row, plan.rows), :] = dx.astype(dx_ref.dtype)
        return carry

    each_rows(block, plan.rows, finish)


def _sights(ref, plan: Plan, shift: int, row, rows: int):
    """Behind and ahead, `[rows 128]` each, at the given[shift]'s places."""
    if ref is None:
        return None, None
    at = 2 * shift * plan.block if plan.late else 0
    return rows_at(ref, row + at, rows), rows_at(ref, row + at + plan.block, rows)


def _sums(
    weight_ref, bias_ref, plane, window, given, sums_ref, seen_ref, plan: Plan, i: int, first
):  # fmt: skip
    """Gradients of a level's sums, and of its weights and bias."""
    level, rows, before = plan.levels[i], _SUMS, plan.planes()[i]
    zero = jnp.zeros((_SUMS, tpu.LANES), jnp.float32)

    def part(row, totals):
        place = first + row
        behind, ahead = _sights(seen_ref, plan, i + 1, row, rows)
        newest = jnp.maximum(place, -rows) if plan.late else place
        newest = before + newest + level.late
        taps = taps_of(plane, level, newest, rows, behind, ahead)
        da = rows_at(given, row, rows)
        if behind is not None:
            da = jnp.where(behind >= 0, da, 0)
        if plan.residual:
            a = weighted(taps, weight_ref, level) + bias_ref[i : i + 1, :]
            da = jnp.where(a > 0, da, 0)
        window[pl.ds(row, rows), :] = da
        new = [total + da * tap for total, tap in zip(totals, taps, strict=False)]
        return (*new, totals[-1] + da)

    totals = each_rows(plan.block, rows, part, (zero,) * (level.taps + 1))
    n_weights = sums_ref.shape[0] // _SUMS - len(plan.levels)
    for at, total in zip(
        (*range(level.row, level.row + level.taps), n_weights + i), totals, strict=True
    ):
        sums_ref[at * _SUMS : (at + 1) * _SUMS] += total


def _inputs(weight_ref, window, given, out, seen_ref, plan: Plan, i: int, n):
    """Gradients of what a level reads."""
    level, rows = plan.levels[i], plan.rows
    shift = plan.earliness()[i]

    def part(row, carry):
        behind, ahead = _sights(seen_ref, plan, i, row, rows)
        # Seen from the input: tap a brings it to the token (a - center) d after it.
        taps = [
            seen(
                rows_at(window, row + a * level.dilation, rows),
                (a - level.center) * level.dilation,
                ahead,
                behind,
            )
            for a in range(level.taps)
        ]
        ds = weighted(taps, weight_ref, level)
        if plan.residual:
            ds = ds + rows_at(given, row + level.late, rows)
        if behind is not None:
            ds = jnp.where(behind >= 0, ds, 0)
        elif plan.late:
            ds = jnp.where(in_row(n * plan.block + row + shift, rows, plan.t), ds, 0)
        out[pl.ds(row, rows), :] = ds
        return carry

    each_rows(plan.block, rows, part)
