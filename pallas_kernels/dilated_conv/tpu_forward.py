"""The forward kernel: all levels of the stack, one block of time after the other."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import tpu
from pallas_kernels.core.tpu_parts import Refs
from pallas_kernels.dilated_conv.tpu_plan import (
    Plan,
    columns,
    each_rows,
    in_row,
    move,
    rows_at,
    taps_of,
    tokens_below,
    weighted,
)


def sight_rows(plan: Plan) -> int:
    """How many numbers a token bears: behind and ahead for each lateness; causal: behind alone."""
    return 2 * len(plan.levels) if plan.late else 1


def forward(
    x, weight, bias, sights, plan: Plan, config, *, save: bool = False, past=None, end=None
):  # fmt: skip
    """y `[b t e]`, and what each level reads before the start of each segment, or None.

    With a past: y, and what each level reads up to the last token.

    Args:
        x: `[b t e]`.
        weight: `[j*w e]`, bias: `[j e]`, float32.
        sights: int32 `[b r n]`, see `sight_rows`; None = one document.
        plan: see Plan.
        config: of the form.
        save: whether there is a backward pass.
        past: float32 `[b m e]`, what the levels read before the row, m = sum of plan.margins().
        end: int32 `[b]` with a past: behind the last token.
    """
    b, t, e = x.shape
    lanes, margins = tpu.LANES, plan.margins()
    starts, streams = save and plan.segments > 1, past is not None
    tokens = lambda index: pl.BlockSpec((1, plan.block, lanes), index)
    last, extra = plan.blocks - 1, plan.extra
    in_specs = [
        tokens(lambda c, i, n, *_: (i, jnp.minimum(n, last), c)),
        pl.BlockSpec((weight.shape[0], lanes), lambda c, i, n, *_: (0, c)),
        pl.BlockSpec((bias.shape[0], lanes), lambda c, i, n, *_: (0, c)),
    ]
    arguments = [x, weight, bias]
    scratch = [pltpu.VMEM((m + plan.block, lanes), jnp.float32) for m in margins]
    if sights is not None:
        r = sights.shape[1]
        in_specs.append(pl.BlockSpec((1, r, plan.block), lambda c, i, n, *_: (i, 0, n)))
        arguments.append(sights)
        scratch.append(pltpu.VMEM((r * plan.block, lanes), jnp.int32))
    whole = pl.BlockSpec((1, sum(margins), lanes), lambda c, i, n, *_: (i, 0, c))
    if streams:
        in_specs.append(whole)
        arguments = [end, *arguments, past]
    out_specs = [tokens(lambda c, i, n, *_: (i, jnp.maximum(n - extra, 0), c))]
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    if starts:
        size = sum(margins)
        out_specs.append(
            pl.BlockSpec((1, 1, size, lanes), lambda c, i, n, *_: (i, n // plan.segment, 0, c))
        )
        out_shape.append(jax.ShapeDtypeStruct((b, plan.segments, size, e), jnp.float32))
    if streams:
        out_specs.append(whole)
        out_shape.append(jax.ShapeDtypeStruct(past.shape, jnp.float32))
    found = tpu.kernel_call(
        functools.partial(_fwd_kernel, plan=plan, starts=starts, streams=streams),
        name="dilated_conv_forward",
        config=config,
        grid=(pl.cdiv(e, lanes), b, plan.blocks + extra),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        semantics=("parallel", "parallel", "arbitrary"),
        cost=cost(x, plan, 1),
        num_scalar_prefetch=int(streams),
    )(*arguments)
    return found[0], found[1] if starts or streams else None


def cost(x, plan: Plan, passes: int) -> pl.CostEstimate:
    """Of so many passes over the levels' taps."""
    taps = sum(2 * level.taps + 3 for level in plan.levels)
    return pl.CostEstimate(
        flops=passes * taps * x.size,
        bytes_accessed=(2 if passes == 1 else 3) * x.size * x.dtype.itemsize,
        transcendentals=0,
    )


def _fwd_kernel(*refs, plan: Plan, starts: bool, streams: bool):
    given = Refs(refs)
    end_ref = given.take(streams)
    x_ref, weight_ref, bias_ref = given.several(3)
    sights_ref, past_ref = given.take(plan.documents), given.take(streams)
    y_ref, starts_ref, last_ref = given.take(), given.take(starts), given.take(streams)
    windows, seen_ref = given.several(len(plan.levels)), given.take(plan.documents)
    step, margins, block = pl.program_id(2), plan.margins(), plan.block
    row_of_batch = pl.program_id(1)
    places = [sum(margins[:i]) for i in range(len(margins))]

    @pl.when(step == 0)
    def _():
        for ref, margin, at in zip(windows, margins, places, strict=True):
            if streams:
                ref[:margin] = past_ref[0, at : at + margin]
            else:
                ref[:margin] = jnp.zeros((margin, tpu.LANES), jnp.float32)

    @pl.when(step > 0)
    def _():
        for ref, margin in zip(windows, margins, strict=True):
            move(ref, 0, block, margin)

    if starts:

        @pl.when(step % plan.segment == 0)
        def _():
            for ref, margin, at in zip(windows, margins, places, strict=True):
                starts_ref[0, 0, at : at + margin] = ref[:margin]

    if plan.documents:
        columns(sights_ref[0], seen_ref)
    windows[0][margins[0] :] = tokens_below(x_ref[0], plan.t - step * block)

    def part(row, carry):
        for i in range(len(plan.levels)):
            oldest = row + margins[i] - (plan.hold if i == 0 else 0)
            s = next_level(
                windows[i],
                weight_ref,
                bias_ref,
                plan,
                i,
                oldest,
                *sights_of(seen_ref, plan, i, row),
            )
            if plan.late and not plan.documents:
                first = step * block + row - plan.hold - plan.lateness()[i + 1]
                s = jnp.where(in_row(first, plan.rows, plan.t), s, 0)
            if i + 1 < len(plan.levels):
                windows[i + 1][pl.ds(row + margins[i + 1], plan.rows), :] = s
            else:
                y_ref[0, pl.ds(row, plan.rows), :] = s.astype(y_ref.dtype)
        return carry

    each_rows(block, plan.rows, part)

    if streams:
        end = end_ref[row_of_batch] - step * block

        @pl.when((end > 0) & (end <= block))
        def _():
            for ref, margin, at in zip(windows, margins, places, strict=True):
                for first in range(0, margin, 64):  # a few registers at a time
                    rows = min(64, margin - first)
                    here = slice(at + first, at + first + rows)
                    last_ref[0, here] = rows_at(ref, end + first, rows)


def sights_of(ref, plan: Plan, i: int, row):
    """What tokens see behind and ahead, `[rows 128]` each, at the outputs of level i."""
    if ref is None:
        return None, None
    at = 2 * i * plan.block if plan.late else 0
    behind = rows_at(ref, row + at, plan.rows)
    return behind, rows_at(ref, row + at + plan.block, plan.rows) if plan.late else None


def next_level(ref, weight_ref, bias_ref, plan: Plan, i: int, row, behind, ahead):
    """`[rows 128]` of the next level, 0 at padding; `row` is where tap 0 reads."""
    level = plan.levels[i]
    taps = taps_of(ref, level, row, plan.rows, behind, ahead)
    s = weighted(taps, weight_ref, level) + bias_ref[i : i + 1, :]
    if plan.residual:
        s = rows_at(ref, row - level.late, plan.rows) + jnp.maximum(s, 0)
    return s if behind is None else jnp.where(behind >= 0, s, 0)
