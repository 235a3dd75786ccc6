"""The forward kernel of the gated delta rule: a span of one head per step, states carried."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import tpu
from pallas_kernels.core.tpu_parts import Refs
from pallas_kernels.gated_delta_rule import tpu_span
from pallas_kernels.gated_delta_rule.tpu_span import How, Places
from pallas_kernels.gated_delta_rule.tpu_tile import START, dot, interpreted


def forward(q, k, v, places: Places, s, memory, how: How, *, keep: bool, cost):
    """y, the last states, and the states that the backward pass starts from.

    Args:
        q, k: `[b t h k]`.
        v: `[b t h v]`.
        places: of whole spans.
        s: float32 `[b m h k v]`, or None = zeros `[b 1 h k v]`.
        memory: int32 `[b chunks]`, or None = there is one.
        how: what is fixed.
        keep: whether to give the state before each `stride`-th span (of the span's first memory).
        cost: pl.CostEstimate.

    Returns:
        y `[b t h v]`, s `[b m h k v]`, starts `[b spans/stride h k v]` in the dtype of k, or None.
    """
    b, t, h, width = k.shape
    m, values = 1 if s is None else s.shape[1], v.shape[-1]
    spans = pl.cdiv(t, how.span)
    blocks = tpu_span.specs(how, (m, width, values), lambda n: n)
    last = jax.ShapeDtypeStruct((b, m, h, width, values), jnp.float32)
    starts = jax.ShapeDtypeStruct((b, pl.cdiv(spans, how.stride), h, width, values), k.dtype)
    y = jax.ShapeDtypeStruct((b, t, h * values), v.dtype)
    copy = lambda size: pltpu.VMEM((how.span, size), k.dtype)
    y, s, *starts = tpu.kernel_call(
        functools.partial(_body, how=how, fresh=s is None, memories=memory is not None, keep=keep),
        name="gated_delta_rule_forward",
        config=how.config,
        grid=(b, h, spans),
        in_specs=[
            *(blocks.gates, blocks.gates, *([blocks.document] if how.masked else [])),
            *(blocks.keys, blocks.keys, blocks.values, *([] if s is None else [blocks.states])),
        ],
        out_specs=[blocks.values, blocks.states, *([blocks.start] if keep else [])],
        out_shape=[y, last, *([starts] if keep else [])],
        semantics=("parallel", "parallel", "arbitrary"),
        scratch_shapes=[
            *tpu_span.scratch(how, width, values, k.dtype, alike=False),
            *([copy(width), copy(width), copy(values)] if how.masked else []),
        ],
        num_scalar_prefetch=0 if memory is None else 1,
        cost=cost,
    )(*(x for x in (memory, *places, *map(tpu_span.flat, (q, k, v)), s) if x is not None))
    return y.reshape(v.shape), s, starts[0] if keep else None


def _body(*given, how: How, fresh: bool, memories: bool, keep: bool):
    refs = Refs(given)
    memory = refs.take(memories)
    g, beta, document = refs.take(), refs.take(), refs.take(how.masked)
    places = Places(g.at[0, 0], beta.at[0, 0], document.at[0] if how.masked else None)
    tokens = refs.several(3)
    s_before, y, s, starts = refs.take(not fresh), refs.take(), refs.take(), refs.take(keep)
    x = tpu_span.work(refs.several(tpu_span.scratch_count(alike=False)), alike=False)
    copies = refs.several(3 if how.masked else 0)
    row, step = pl.program_id(0), pl.program_id(2)

    def memory_of(place):
        return 0 if memory is None else memory[row, step * how.chunks + place]

    @pl.when(step == 0)
    def _():
        s[...] = jnp.zeros_like(s) if s_before is None else s_before[...]

    if starts is not None:

        @pl.when(lax.rem(step, how.stride) == 0)
        def _():
            starts[0, 0, 0] = s[0, memory_of(0), 0].astype(starts.dtype)

    state = lambda place, lane: s.at[0, memory_of(place), 0, :, lane]
    with interpreted(how.config.interpret):
        q, k, v = tpu_span.tokens(tokens, copies, places, how)
        tpu_span.before_states(places, q, k, v, x, how)
        tpu_span.carry(state, x, how, read=True)
        _read_out(y.at[0], x, how)


def _read_out(y: Any, x: tpu_span.Work, how: How) -> None:
    """y `[span v]`."""

    def tile(i):
        tile = tpu_span.tile_at(x, i, how)

        def columns(n):
            start = how.scale * tile.columns[START]
            scores = tile.spread(x.scores[tile.packed, :]).astype(y.dtype)
            for lane in tpu_span.side_by_side(n, y.shape[1]):
                out = start * x.values[tile.at, lane] + dot(scores, x.written[tile.at, lane])
                y[tile.at, lane] = out.astype(y.dtype)

        tpu_span.over_lanes(columns, y.shape[1])

    tpu_span.loop(how.tiles, tile)
