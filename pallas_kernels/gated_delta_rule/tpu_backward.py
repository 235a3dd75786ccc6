"""The backward kernel of the gated delta rule: spans from the last to the first.

From the state before a span its chunks are computed again, which leaves their states and what they
wrote in vector memory; then the chunks are walked back with the gradient of the state.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.core import tpu
from pallas_kernels.gated_delta_rule import tpu_span, tpu_tile
from pallas_kernels.gated_delta_rule.tpu_span import How, Work
from pallas_kernels.gated_delta_rule.tpu_tile import (
    BETA,
    END,
    ROWS,
    START,
    TILE,
    Tile,
    dot,
    dot_across,
    dot_down,
    interpreted,
)

DSUM, DBETA = range(2)  # rows of the gradients by the numbers per token


class Grads(NamedTuple):
    """References to gradients on their way; README.md says what the letters are.

    Attributes:
        states: S before each chunk of the span, `[chunks k v]`.
        solved: T^T of a tile, `[128 128]`.
        keys: by diag(beta f) K of a tile, `[128 k]` float32.
        queries: by diag(scale f) Q, the same.
        ends: d times that by diag(d) K, the same.
        met: of a chunk, by B V and by y: what meets its state, `[2 chunk v]`.
        back: what takes its state's gradient back, beside W and Q, the same.
        by_scores: by Q K^T of a tile, spread, `[128 128]`.
        by_alike: by K K^T and its transposed, the same.
        dsum: numbers whose sums along rows are what g's sums get, `[128 128]` float32.
        dbeta: the same for beta.
        last: what g's sums get beside it, `[1 128]` float32.
    """

    states: Any
    solved: Any
    keys: Any
    queries: Any
    ends: Any
    met: Any
    back: Any
    by_scores: Any
    by_alike: Any
    dsum: Any
    dbeta: Any
    last: Any


def _scratch(how: How, k: int, v: int, dtype: Any) -> Grads:
    by_key, square = pltpu.VMEM((TILE, k), jnp.float32), pltpu.VMEM((TILE, TILE), dtype)
    wide = pltpu.VMEM((TILE, TILE), jnp.float32)
    return Grads(
        states=pltpu.VMEM((how.span // how.chunk, k, v), dtype),
        solved=square,
        keys=by_key,
        queries=by_key,
        ends=by_key,
        met=pltpu.VMEM((2 * how.chunk, v), dtype),
        back=pltpu.VMEM((2 * how.chunk, v), dtype),
        by_scores=square,
        by_alike=square,
        dsum=wide,
        dbeta=wide,
        last=pltpu.VMEM((1, TILE), jnp.float32),
    )


class Arrays(NamedTuple):
    """References to a span's blocks."""

    gates: Any
    q: Any
    k: Any
    v: Any
    dy: Any


class Results(NamedTuple):
    """References to the blocks of a span's gradients."""

    dq: Any
    dk: Any
    dv: Any
    dgates: Any


def backward(q, k, v, gates, s, starts, memory, dy, ds, how: How, *, cost):
    """Gradients of q, k, v, of what gates hold, and of the first states.

    Args:
        q, k, v, gates, memory, how: as `tpu_forward.forward` took them.
        s: the first states; read only where there are memories.
        starts: what the forward pass kept.
        dy: `[b t h v]`, in the dtype of k.
        ds: float32 `[b m h k v]`, of the last states.
        cost: pl.CostEstimate.

    Returns:
        dq, dk, dv; float32 `[b h tiles 8 128]`: row DSUM is by the sum of g up to a token of its
        chunk, row DBETA by beta; ds of the first states.
    """
    b, t, h, width = k.shape
    m, values = ds.shape[1], v.shape[-1]
    spans = pl.cdiv(t, how.span)
    blocks = tpu_span.specs(how, m, width, values, lambda n: spans - 1 - n)
    memories = memory is not None
    flat = lambda x: x.reshape(b, t, -1)
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    dq, dk, dv, dgates, ds = tpu.kernel_call(
        functools.partial(_body, how=how, memories=memories, spans=spans),
        name="gated_delta_rule_backward",
        config=how.config,
        grid=(b, h, spans),
        in_specs=[
            *([blocks.states] if memories else []),
            *(blocks.start, blocks.states),
            *(blocks.gates, blocks.keys, blocks.keys, blocks.values, blocks.values),
        ],
        out_specs=[blocks.keys, blocks.keys, blocks.values, blocks.gates, blocks.states],
        out_shape=[like(flat(q)), like(flat(k)), like(flat(v)), like(gates), like(ds)],
        semantics=("parallel", "parallel", "arbitrary"),
        num_scalar_prefetch=int(memories),
        scratch_shapes=[
            pltpu.VMEM((width, values), jnp.float32),
            *_scratch(how, width, values, k.dtype),
            *tpu_span.scratch(how, width, values, k.dtype, alike=True),
        ],
        cost=cost,
    )(*((memory, s) if memories else ()), starts, ds, gates, flat(q), flat(k), flat(v), flat(dy))
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), dgates, ds


def _body(*refs, how: How, memories: bool, spans: int):
    with interpreted(how.config.interpret):
        _span(*refs, how=how, memories=memories, spans=spans)


def _span(*refs, how: How, memories: bool, spans: int):
    memory, s, refs = (*refs[:2], refs[2:]) if memories else (None, None, refs)
    start, ds_after, *refs = refs
    given, results = Arrays(*refs[:5]), Results(*refs[5:9])
    ds, now, *refs = refs[9:]
    grads, x = Grads(*refs[:12]), tpu_span.work(refs[12:], alike=True)
    row, step = pl.program_id(0), spans - 1 - pl.program_id(2)

    def memory_of(place):
        return 0 if memory is None else memory[row, step * (how.span // how.chunk) + place]

    @pl.when(pl.program_id(2) == 0)
    def _():
        ds[...] = ds_after[...]

    now[...] = start[0, 0, 0].astype(jnp.float32)

    def state(place, lane):
        """The state before a chunk, kept on the way."""
        if s is not None:
            j = memory_of(place)

            @pl.when((place > 0) & (memory_of(jnp.maximum(place - 1, 0)) != j))
            def _():
                now[:, lane] = s[0, j, 0, :, lane]

        grads.states[place, :, lane] = now[:, lane].astype(grads.states.dtype)
        return now.at[:, lane]

    tpu_span.before_states(given.gates, given.q, given.k, given.v, x, how)
    tpu_span.carry(given.gates, state, x, how, read=False)

    def tile_back(n):
        i = how.tiles - 1 - n
        tile = tpu_span.tile_at(given.gates, i, how)
        _begin(tile, given, grads, x, how)

        for part in reversed(range(how.parts)):
            place = i * how.parts + part
            _chunk_back(tile, place, part, given, ds.at[0, memory_of(place), 0], grads, x, how)
        _pairs(tile, given, grads, x, how)
        _tokens(i, tile, given, grads, x, results, how)

    tpu_span.over_tiles(tile_back, how)


def _begin(tile: Tile, given: Arrays, grads: Grads, x: Work, how: How) -> None:
    """What a tile needs before its states; in place of U there is what X gets of its tile's y."""
    operand = given.k.dtype
    spread = lambda ref: tile.spread(ref[tile.packed, :])
    grads.solved[...] = spread(x.pairs.solved).T.astype(operand)
    scores = spread(x.scores).astype(operand)
    x.values[tile.at, :] = dot_down(scores, tile.read(given.dy, how.masked))
    grads.last[...] = jnp.zeros_like(grads.last)


def _chunk_back(tile: Tile, place, part, given: Arrays, ds, grads: Grads, x: Work, how: How):
    """Takes the gradient of the state `[k v]` back through a chunk."""
    c, operand = how.chunk, given.k.dtype
    own = slice(part * c, (part + 1) * c)
    own_at = tpu_tile.rows_of(tile.at, part * c, c)
    columns = tile.columns
    start, end = columns[START][own], columns[END][own]
    through = tile.rows[START : START + 1, own.stop - 1 : own.stop]
    seen = _seen(columns, own, how)

    keys = seen(given.k[0, own_at, :])
    for lane in tpu_span.lanes(ds.shape[1]):
        dx = x.values[own_at, lane] + end * dot(keys, ds[:, lane].astype(operand))
        dx = dx.astype(operand)
        dvalues = dot(grads.solved[own, :], tpu_span.in_its_place(dx, part, how))
        x.values[own_at, lane] = dvalues
        dy = seen(given.dy[0, own_at, lane])
        grads.met[:c, lane], grads.met[c:, lane] = dvalues.astype(operand), dy
        grads.back[:c, lane] = -dx
        grads.back[c:, lane] = (how.scale * start * dy.astype(jnp.float32)).astype(operand)

    def by_key(lane):
        columns = tile.columns
        end, seen = columns[END][own], _seen(columns, own, how)
        rows, lane_at = tpu_span.lane_at(lane), tpu_span.lane_at(lane)
        before = grads.states.at[place, rows, :]
        both = dot_across(grads.met[...], before[...])
        grads.keys[own, lane_at], grads.queries[own, lane_at] = -both[:c], both[c:]
        ends = end * dot_across(x.written[own_at, :], ds[rows, :].astype(operand))
        grads.ends[own, lane_at] = ends
        last = ends * seen(given.k[0, own_at, lane_at]).astype(jnp.float32)
        last = jnp.sum(last, axis=0, keepdims=True)
        met = x.met[tpu_span.met_at(place, how), lane_at].T
        for wide in tpu_span.lanes(ds.shape[1]):
            after = ds[rows, wide]
            kept = before[:, wide].astype(jnp.float32) * after
            last = last + through * jnp.sum(kept, axis=0, keepdims=True)
            ds[rows, wide] = through * after + dot(met, grads.back[:, wide])
        at_end = lax.broadcasted_iota(jnp.int32, (1, TILE), 1) == own.stop - 1
        grads.last[...] += jnp.where(at_end, jnp.sum(last, axis=1, keepdims=True), 0.0)

    tpu_span.over_lanes(by_key, keys.shape[1])


def _seen(columns, own, how: How):
    """Sets what stands where there is no token to 0."""
    if not how.masked:
        return lambda x: x
    valid = columns[tpu_tile.VALID][own] > 0
    return lambda x: jnp.where(valid, x, jnp.zeros_like(x))


def _pairs(tile: Tile, given: Arrays, grads: Grads, x: Work, how: How) -> None:
    """What the tokens of a tile got through each other."""
    operand = given.k.dtype
    packed = lambda ref: ref[tile.packed, :]
    # What was written: through T, whose gradient is dL = -T^T dT T^T.
    written = x.written[tile.at, :]
    dlower = -tile.pack(dot_across(x.values[tile.at, :].astype(operand), written))
    rows, lanes = tile.places()
    beta = tile.pack(tile.columns[BETA])
    by_alike = jnp.where(rows > lanes, beta * dlower * packed(x.pairs.faded), 0.0)
    by_alike = tile.spread(by_alike)
    grads.by_alike[...] = (by_alike + by_alike.T).astype(operand)
    grads.dbeta[...] = tile.spread(dlower * packed(x.pairs.alike))
    # What was read.
    dscores = tile.pack(dot_across(tile.read(given.dy, how.masked), written))
    by_scores = tile.spread(how.scale * dscores * packed(x.pairs.faded))
    grads.by_scores[...] = by_scores.astype(operand)
    by_pairs = dscores * packed(x.scores) + dlower * packed(x.pairs.lower)
    grads.dsum[...] = tile.spread(by_pairs)
    grads.last[...] -= jnp.sum(by_pairs, axis=0, keepdims=True)


def _tokens(i, tile: Tile, given: Arrays, grads: Grads, x: Work, to: Results, how: How) -> None:
    """The gradients of a tile's arguments."""
    operand = given.k.dtype

    def by_query(lane):
        lane, start = tpu_span.lane_at(lane), tile.columns[START]
        dq_start = how.scale * start * grads.queries[:, lane]
        dq = dq_start + dot(grads.by_scores[...], tile.read(given.k, how.masked, lane))
        to.dq[0, tile.at, lane] = dq.astype(operand)
        grads.dsum[...] += dq_start * tile.read(given.q, how.masked, lane).astype(jnp.float32)

    def by_key(lane):
        lane, beta, start = tpu_span.lane_at(lane), tile.columns[BETA], tile.columns[START]
        keys = tile.read(given.k, how.masked, lane)
        dk = dot_down(grads.by_scores[...], tile.read(given.q, how.masked, lane))
        dk = dk + dot(grads.by_alike[...], keys)
        dk_start, dk_end = start * grads.keys[:, lane], grads.ends[:, lane]
        to.dk[0, tile.at, lane] = (dk + beta * dk_start + dk_end).astype(operand)
        keys = keys.astype(jnp.float32)
        grads.dbeta[...] += dk_start * keys
        grads.dsum[...] += (beta * dk_start - dk_end) * keys

    def by_value(lane):
        beta = tile.columns[BETA]
        lane = tpu_span.lane_at(lane)
        dvalues = x.values[tile.at, lane]
        to.dv[0, tile.at, lane] = (beta * dvalues).astype(operand)
        grads.dbeta[...] += dvalues * tile.read(given.v, how.masked, lane).astype(jnp.float32)

    tpu_span.over_lanes(by_query, given.k.shape[2])
    tpu_span.over_lanes(by_key, given.k.shape[2])
    tpu_span.over_lanes(by_value, given.v.shape[2])
    dsum, dbeta = (jnp.sum(x[...].T, axis=0, keepdims=True) for x in (grads.dsum, grads.dbeta))
    row = lax.broadcasted_iota(jnp.int32, (ROWS, TILE), 0)
    dbeta = jnp.where(row == DBETA, dbeta, 0.0)
    to.dgates[0, 0, i] = jnp.where(row == DSUM, dsum + grads.last[...], dbeta)
