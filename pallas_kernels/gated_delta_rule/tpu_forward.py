"""The forward kernel of the gated delta rule: a span of one head per step, states carried."""

import functools

import jax
from jax.experimental import pallas as pl

from pallas_kernels.core import tpu
from pallas_kernels.gated_delta_rule import tpu_span
from pallas_kernels.gated_delta_rule.tpu_span import How
from pallas_kernels.gated_delta_rule.tpu_tile import START, dot, interpreted


def forward(q, k, v, gates, s, memory, how: How, *, keep: bool, cost):
    """y and the last states; with `keep` the state before each span too (of its first memory).

    Args:
        q, k: `[b t h k]`.
        v: `[b t h v]`.
        gates: float32 `[b h tiles 8 128]`, see tpu_tile.
        s: float32 `[b m h k v]`.
        memory: int32 `[b chunks]`, or None = there is one.
        how: what is fixed.
        keep: for the backward pass.
        cost: pl.CostEstimate.

    Returns:
        y `[b t h v]`, s `[b m h k v]`, starts `[b spans h k v]` in the dtype of k, or None.
    """
    b, t, h, width = k.shape
    m, values = s.shape[1], v.shape[-1]
    spans = pl.cdiv(t, how.span)
    blocks = tpu_span.specs(how, m, width, values, lambda n: n)
    prefetched = () if memory is None else (memory,)
    flat = lambda x: x.reshape(b, t, -1)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    starts = jax.ShapeDtypeStruct((b, spans, h, width, values), k.dtype)
    y, s, *starts = tpu.kernel_call(
        functools.partial(_body, how=how, memories=memory is not None, keep=keep),
        name="gated_delta_rule_forward",
        config=how.config,
        grid=(b, h, spans),
        in_specs=[blocks.gates, blocks.keys, blocks.keys, blocks.values, blocks.states],
        out_specs=[blocks.values, blocks.states, *([blocks.start] if keep else [])],
        out_shape=[like(flat(v)), like(s), *([starts] if keep else [])],
        semantics=("parallel", "parallel", "arbitrary"),
        scratch_shapes=tpu_span.scratch(how, width, values, k.dtype, alike=False),
        num_scalar_prefetch=len(prefetched),
        cost=cost,
    )(*prefetched, gates, flat(q), flat(k), flat(v), s)
    return y.reshape(v.shape), s, starts[0] if keep else None


def _body(*refs, how: How, memories: bool, keep: bool):
    with interpreted(how.config.interpret):
        _span(*refs, how=how, memories=memories, keep=keep)


def _span(*refs, how: How, memories: bool, keep: bool):
    memory, refs = (refs[0], refs[1:]) if memories else (None, refs)
    gates, q, k, v, s_before, y, s, *refs = refs
    starts, refs = (refs[0], refs[1:]) if keep else (None, refs)
    x = tpu_span.work(refs, alike=False)
    row, step = pl.program_id(0), pl.program_id(2)

    def memory_of(place):
        return 0 if memory is None else memory[row, step * (how.span // how.chunk) + place]

    @pl.when(step == 0)
    def _():
        s[...] = s_before[...]

    if starts is not None:
        starts[0, 0, 0] = s[0, memory_of(0), 0].astype(starts.dtype)
    tpu_span.before_states(gates, q, k, v, x, how)
    tpu_span.carry(
        gates, lambda place, lane: s.at[0, memory_of(place), 0, :, lane], x, how, read=True
    )

    def read_out(i):
        tile = tpu_span.tile_at(gates, i, how)
        start = how.scale * tile.columns[START]
        scores = tile.spread(x.scores[tile.packed, :]).astype(k.dtype)
        for n in range(0, v.shape[2], tpu.LANES):
            lane = slice(n, n + tpu.LANES)
            out = start * x.values[tile.at, lane] + dot(scores, x.written[tile.at, lane])
            y[0, tile.at, lane] = out.astype(y.dtype)

    tpu_span.over_tiles(read_out, how)
